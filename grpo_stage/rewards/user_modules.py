"""A user's Python files as modules that every process can import: `grpo_stage.rewards.user_modules.<folder>.<file>`.

Functions and objects travel to another process by the name of their module, which that process imports. The name of a
file's module holds its path, and importing it loads this module first, whose finder reads the path. So it works
wherever this package is installed: in what `multiprocessing` spawns or forks from a server, and under joblib. Files of
one name in different folders are different modules, and none is taken for an installed package.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, invalidate_caches
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any


__path__: list[str] = []  # a package, whose modules `_Finder` finds
_DOT = "_2e"


def module_of(file: Path) -> ModuleType:
    """The module of a file, which is loaded once in a process. Raises what the file raises."""
    file = file.resolve()
    return import_module(f"{__name__}.{_as_name(file.parent)}.{file.stem.replace('.', _DOT)}")


@contextmanager
def first_on_path(folder: Path) -> Iterator[None]:
    """Within the block, modules in `folder` can be imported, before others of the same name."""
    sys.path.insert(0, str(folder))
    invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))


class _Loader(SourceFileLoader):
    """Runs a file with its own folder first on the path, as Python runs a script."""

    def get_code(self, fullname: str) -> CodeType:
        """From the source alone, whose hash was announced: a cached file may hold other code."""
        return self.source_to_code(self.get_data(self.path), self.path)

    def exec_module(self, module: ModuleType) -> None:
        with first_on_path(Path(self.path).parent):
            super().exec_module(module)


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith(f"{__name__}."):
            return None
        folder, _, stem = name.removeprefix(f"{__name__}.").partition(".")
        if not stem:
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [_as_path(folder)]  # `from .helper import f` finds the file beside it
            return spec
        file = Path(_as_path(folder), f"{stem.replace(_DOT, '.')}.py")
        if "." in stem or not file.is_file():
            return None
        return spec_from_file_location(name, file, loader=_Loader(name, str(file)))


def _as_name(folder: Path) -> str:
    """A path as an identifier, from which `_as_path` restores it."""
    return re.sub(rb"[^a-zA-Z0-9]", lambda found: b"_%02x" % found[0][0], os.fsencode(folder)).decode("ascii")


def _as_path(name: str) -> str:
    return os.fsdecode(re.sub(rb"_([0-9a-f]{2})", lambda found: bytes([int(found[1], 16)]), name.encode()))


sys.meta_path.insert(0, _Finder)  # before Python's own, which would load the file without its folder on the path
