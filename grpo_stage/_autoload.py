"""What the `.pth` imports at every interpreter start: hooks for the few host modules that the stage changes.

The standard library alone, and as little of it as can be: this runs in every Python of the environment. A hook fires
right after its module was executed, before anyone can import a name from it, and only then is the rest of the package
loaded. `GRPO_STAGE_DISABLE=1` turns it off.
"""

import os
import sys


TYPE_CHECKING = False  # `typing` would cost more than all of this module
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

WATCHED = frozenset(
    {
        "llamafactory.hparams.parser",
        "llamafactory.launcher",
        "llamafactory.train.tuner",
        "llamafactory.v1.launcher",
        "llamafactory.webui.common",
        "llamafactory.webui.components.data",
        "llamafactory.webui.components.top",
        "llamafactory.webui.components.train",
        "llamafactory.webui.control",
        "llamafactory.webui.engine",
        "llamafactory.webui.interface",
        "llamafactory.webui.locales",
        "llamafactory.webui.runner",
    }
)


def is_enabled(variable: str) -> bool:
    """Read a switch in the environment as the host reads its own."""
    return os.environ.get(variable, "0").lower() in ("true", "y", "1")


def is_watched(name: str) -> bool:
    """Whether the module called `name` is to be changed. The launcher concerns us in training only."""
    is_training = sys.argv[1:2] == ["train"] or is_enabled("USE_MCA")
    return name in WATCHED and (name != "llamafactory.launcher" or is_training)


def starts_run(argv: "list[str]") -> bool:
    """Whether a command line trains with this stage, of `llamafactory-cli` or of a process that torchrun starts.

    The recipe's text is searched, since a parser takes long to import: should it only be about the stage, a stop
    before training ends that run with a line in place of a traceback.
    """
    program = argv[0] if argv else ""  # `-m` until a module that is named so has been found
    is_module = program == "-m" and "llamafactory.launcher" in sys.orig_argv
    is_of_torchrun = is_module or program.endswith(os.path.join("llamafactory", "launcher.py"))
    if not is_of_torchrun and argv[1:2] != ["train"]:
        return False
    words = argv[1:] if is_of_torchrun else argv[2:]
    texts = [" ".join(words)]
    if words and words[0].endswith((".yaml", ".yml", ".json")) and os.path.isfile(words[0]):
        with open(words[0], encoding="utf-8", errors="replace") as file:
            texts.append(file.read())
    import re

    return any(re.search(r"""\bstage["']?[\s:=]+["']?grpo\b""", text) for text in texts)


def is_spawned() -> bool:
    """Whether this is a process of `multiprocessing`, which has the command line of the one that started it."""
    processes = sys.modules.get("multiprocessing.process")
    return processes is not None and processes.parent_process() is not None


class PostImportFinder:
    """Finds the watched modules with the other finders, and has `on_import` called once they are executed."""

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name == "llamafactory" and not is_spawned() and starts_run(sys.argv):  # first of many seconds of imports
            from .survival.stop import end_at_once

            end_at_once()
        if not is_watched(name):
            return None
        finders = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
        if spec is not None and spec.loader is not None:
            _notify_after_execution(spec.loader)
        return spec


def _notify_after_execution(loader: "Any") -> None:
    """Wrap `exec_module` on this one loader, whose type so stays what `inspect` and others expect."""
    execute = loader.exec_module

    def exec_module(module: "ModuleType") -> None:
        loader.exec_module = execute
        without_collection(execute, module)
        _on_import(module)

    loader.exec_module = exec_module


def without_collection(importing: "Callable[..., Any]", *arguments: "Any") -> "Any":
    """Call what imports the host, and collect no garbage meanwhile.

    The millions of objects of torch and transformers stay, and to look through them again and again takes two of the
    seven seconds.
    """
    import gc

    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return importing(*arguments)
    finally:
        if was_enabled:
            gc.enable()


def _on_import(module: "ModuleType") -> None:
    from importlib import import_module

    import_module("grpo_stage.plugin.registration").on_import(module)  # by name: it stands above, and imports this


_FINDER = PostImportFinder()


def register() -> None:
    """Watch for the host's modules, and change those that are there already. May be called twice."""
    if _FINDER in sys.meta_path:
        return
    sys.meta_path.insert(0, _FINDER)
    for name in filter(is_watched, WATCHED & sys.modules.keys()):
        _on_import(sys.modules[name])


def unregister() -> None:
    """Watch no longer."""
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)


def _say_that_it_is_off() -> None:
    if is_enabled("GRPO_STAGE_DISABLE"):  # which `python -m grpo_stage` takes away
        print(
            "`stage: grpo` belongs to grpo-stage, which GRPO_STAGE_DISABLE=1 turns off. Unset that variable, or start "
            "the run with `python -m grpo_stage train ...`.",
            file=sys.stderr,
        )


if not is_enabled("GRPO_STAGE_DISABLE"):
    register()
elif starts_run(sys.argv):
    import atexit

    atexit.register(_say_that_it_is_off)  # behind the host's own error
