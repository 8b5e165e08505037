"""Which code a reward function is: the one rule for what may be one, and the record of what will run.

A recipe alone must not run code. So `path/file.py:function` and `package.module:function` are located and judged
before anything of them is imported, and the object that is then found under the name before it is called.
"""

import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from grpo_stage.rewards.user_modules import first_on_path


_INSTALLED = ("site-packages", "dist-packages")
_OURS = Path(__file__).resolve().parents[1]
GAME = "textarena:"
"""What an `environment` that is a game of a package begins with."""
_SCORED = ("completions", "completion_ids")
"""A function that scores completions takes one of these."""


@dataclass(frozen=True, slots=True)
class RewardCode:
    """A function of the user's or of a package, before it is loaded."""

    spec: str
    """As `reward_funcs` names it."""
    file: Path
    """The file that is loaded for it; for a module in an archive, the path within the archive."""
    sha256: str
    """Of the file, as hexadecimal digits."""

    def __str__(self) -> str:
        return f"function `{self.spec.rpartition(':')[2]}` of {self.file}, sha256 {self.sha256[:12]}"

    def check_unchanged(self) -> None:
        """Raise ValueError if the file has changed since this was made."""
        if self.file.is_file() and hashlib.sha256(self.file.read_bytes()).hexdigest() != self.sha256:
            raise ValueError(
                f"{self.file} has changed since the run began, which said and noted the code as it was. Start the run "
                "again to train with what is there now, or bring the file back."
            )

    @property
    def is_installed(self) -> bool:
        """It belongs to an installed package."""
        return _is_installed(self.file)


def describe(specs: Iterable[str], folder: Path) -> list[RewardCode]:
    """The code that will run for these items of `reward_funcs`, built-in ones left out. Nothing is imported.

    Args:
        specs: `path/file.py:function`, `package.module:function`; a name without a colon is a built-in one.
        folder: where relative paths start, and where modules are looked for first.

    Raises:
        ValueError: as `locate`.
    """
    return [locate(spec, folder) for spec in specs if is_code(spec)]


def is_code(spec: str) -> bool:
    """True for a function that is not built in."""
    return bool(spec.rpartition(":")[0].strip()) and not spec.strip().startswith(GAME)


def locate(spec: str, folder: Path) -> RewardCode:
    """Find the file of a function without running any of it.

    Raises:
        ValueError: if there is no such file or module, or it is Python's own.
    """
    place = spec.strip().rpartition(":")[0]
    if place.endswith(".py"):
        file = file_of(place, folder)
        if not file.is_file():
            raise ValueError(
                f"reward {spec!r}: there is no file {file}; a relative path starts at the working directory"
            )
        try:
            content = file.read_bytes()
        except OSError as error:
            raise ValueError(f"reward {spec!r}: {file} cannot be read: {error}. Check its permissions") from error
    else:
        file, content = _module_file(place, spec, folder)
    if _is_pythons_own(file):
        raise _refusal(spec, f"{file} belongs to Python's standard library")
    if file.stem == "__main__" and _is_installed(file):
        raise _refusal(spec, f"{file} is a program, which runs once it is imported")
    return RewardCode(spec.strip(), file, hashlib.sha256(content).hexdigest())


def file_of(place: str, folder: Path) -> Path:
    """The file of `path/file.py`, links resolved."""
    return (folder / Path(place).expanduser()).resolve()


def check_loaded(code: RewardCode, module: ModuleType, function: Any) -> RewardCode:
    """Judge the object that is found under the name of `code`. `RewardFunction.bind` refuses what is not callable.

    Returns:
        `code`, with the file that defines the function: a package may re-export it from another of its modules.

    Raises:
        ValueError: if the object is compiled, of Python's standard library, only imported where it is named, or of
            an installed package without an argument for completions.
    """
    if not callable(function):
        return code
    home = _home(function)
    if home is None:
        raise _refusal(code.spec, f"it is compiled code ({_origin(function)}), and no Python function")
    home_name, home_file = str(home.get("__name__", "")), home.get("__file__")
    if _is_pythons_own(Path(home_file).resolve()) if home_file else home_name.split(".")[0] in sys.stdlib_module_names:
        raise _refusal(code.spec, f"it is {_origin(function)} of Python's standard library")
    is_here = home is vars(module)
    if not is_here and not _is_one_package(code, module, home_name, home_file):
        name = next((name for name, value in home.items() if value is function), None)
        if name is not None:
            place = home_file if home_file and not _is_installed(Path(home_file)) else home_name
            raise ValueError(
                f"reward {code.spec!r}: {name!r} is only imported there, so that the file that is named is not the "
                f"code that runs. Name it where it is defined: `{place}:{name}`."
            )
    if code.is_installed and not _takes_completions(function):
        raise ValueError(
            f"reward {code.spec!r}: it is a function of an installed package and takes neither `completions` nor "
            "`completion_ids`, so that it scores nothing, and a recipe alone must not call it. If it is meant, write "
            "a function of your own (`path/file.py:function`) that takes `completions` and calls it."
        )
    if is_here or home_file is None or not _is_one_package(code, module, home_name, home_file):
        return code
    return replace(code, file=Path(home_file), sha256=hashlib.sha256(Path(home_file).read_bytes()).hexdigest())


def _module_file(place: str, spec: str, folder: Path) -> tuple[Path, bytes]:
    """The file of a module and its content; for a module in an archive, the path within the archive."""
    if place.split(".")[0] in sys.stdlib_module_names:
        same = folder / f"{place.replace('.', '/')}.py"
        own = f" Your own {same} is `{place.replace('.', '/')}.py:...`." if same.is_file() else ""
        raise _refusal(spec, f"the module {place!r} is of Python's standard library", own)
    if "__main__" in place.split("."):
        raise _refusal(spec, f"the module {place!r} is a program, which runs once it is imported")
    with first_on_path(folder):
        found = _find(place)
    if found is None:
        raise ValueError(
            f"reward {spec!r}: there is no module {place!r}. It was looked for in the working directory {folder} "
            f"and then on sys.path: {', '.join(path for path in sys.path if path) or 'none'}"
        )
    if isinstance(found.loader, ExtensionFileLoader):
        raise _refusal(spec, f"{found.origin} is compiled code, and no Python file")
    get_data: Callable[[str], bytes] | None = getattr(found.loader, "get_data", None)
    if not found.has_location or found.origin is None or get_data is None:
        raise _refusal(spec, f"the module {place!r} has no file")
    return Path(found.origin).resolve(), get_data(found.origin)


def _find(name: str) -> ModuleSpec | None:
    """As `importlib.util.find_spec`, but without importing the parent packages."""
    if not all(part.isidentifier() for part in name.split(".")):
        return None
    if name in sys.modules:
        return getattr(sys.modules[name], "__spec__", None)
    parent = name.rpartition(".")[0]
    if not parent:
        return find_spec(name)
    package = _find(parent)
    if package is None or package.submodule_search_locations is None:
        return None
    if not package.has_location:  # a folder without `__init__.py`: importing it runs nothing, and sets its path
        import_module(parent)
    path = list(package.submodule_search_locations)
    specs = (finder.find_spec(name, path) for finder in sys.meta_path)
    return next((found for found in specs if found is not None), None)


def _is_installed(file: Path) -> bool:
    return not {*_INSTALLED}.isdisjoint(file.parts) or file.is_relative_to(_OURS)


def _is_pythons_own(file: Path) -> bool:
    """True for a file below the standard library of any Python, unless it is of an installed package."""
    for folder in file.parents:
        if folder.name in _INSTALLED:
            return False
        if (folder / "os.py").is_file() and (folder / "encodings" / "__init__.py").is_file():
            return True
    return False


def _home(function: Any) -> Mapping[str, Any] | None:
    """The globals of the module that defines the Python function behind `function`; None if that is compiled.

    Decorators, partial functions and methods are followed to what they call, objects to their `__call__`.
    """
    seen: set[int] = set()
    while id(function) not in seen:
        seen.add(id(function))
        if isinstance(function, functools.partial):
            function = function.func
        elif inspect.ismethod(function):
            function = function.__func__
        elif inspect.isclass(function):
            return getattr(sys.modules.get(function.__module__), "__dict__", {})
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        elif isinstance(function, FunctionType):
            return function.__globals__
        else:
            function = type(function).__call__
    return None


def _is_one_package(code: RewardCode, module: ModuleType, home_name: str, home_file: str | None) -> bool:
    """Whether the module that `code` names and the one that defines the function belong to one package."""
    if code.spec.rpartition(":")[0].endswith(".py"):
        is_init = code.file.name == "__init__.py" and home_file is not None
        return is_init and Path(str(home_file)).resolve().is_relative_to(code.file.parent)
    return home_name.split(".")[0] == module.__name__.split(".")[0]


def _takes_completions(function: Any) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # refused by `RewardFunction.bind`
        return True
    return any(p.name in _SCORED for p in parameters)


def _origin(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    return f"`{module}.{name}`" if module and name else f"`{type(function).__module__}.{type(function).__qualname__}`"


def _refusal(spec: str, reason: str, remedy: str = "") -> ValueError:
    return ValueError(
        f"reward {spec!r}: {reason}. A reward function is a Python function of a file of yours or of an installed "
        f"package, since a recipe alone must not run programs.{remedy} Write a `def` in a file of your own, and name "
        "it `path/file.py:function`."
    )
