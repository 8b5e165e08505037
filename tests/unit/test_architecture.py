"""The rules of the source tree: who may import whom. Read out of the source, so that no import has to run."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "grpo_stage"
# Each layer may import from those after it, and within itself. A module is of the layer that names it most exactly.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__", "tools"),
    ("plugin",),
    ("board",),
    ("workflow",),
    ("host",),
    ("plugin.finetuning_args",),
    ("memory",),
    ("layout",),
    ("trainer",),
    ("evaluator",),
    ("collector", "learner"),
    ("rollout.ahead", "rollout.sampler", "survival.resumable"),
    ("survival.phase",),
    ("report", "forecast"),
    ("monitors", "records", "rewards", "rollout", "update"),
    ("arguments",),
    ("rewards.options", "rewards.registry"),
    ("_autoload", "plugin.contract"),
    ("survival",),
    ("distributed", "records.line_log", "records.redaction", "rewards.errors"),
    ("algorithm",),
    ("types",),
)


@dataclass(frozen=True)
class Import:
    importer: str
    """Below the package, dotted: `rollout.engines.hf`."""
    imported: str
    """Absolute, dotted, with the name that is taken from it: `grpo_stage.types.Prompt`."""
    line: int
    at_run_time: bool
    """Not under `if TYPE_CHECKING`."""
    at_module_level: bool
    """Runs when the module is imported."""

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"

    def is_of(self, name: str) -> bool:
        return self.imported == name or self.imported.startswith(f"{name}.")


def imports_of(source: str, importer: str, is_package: bool = False) -> Iterator[Import]:
    parts = ["grpo_stage", *(importer.split(".") if importer else [])]
    package = parts if is_package else parts[:-1]

    def walk(node: ast.AST, at_run_time: bool, at_module_level: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{prefix}.{alias.name}" for alias in node.names]
        else:
            names = []
        for name in names:
            yield Import(importer, name, getattr(node, "lineno", 0), at_run_time, at_module_level)

        at_module_level = at_module_level and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                yield from walk(child, False, at_module_level)
            for child in node.orelse:
                yield from walk(child, at_run_time, at_module_level)
        else:
            for child in ast.iter_child_nodes(node):
                yield from walk(child, at_run_time, at_module_level)

    yield from walk(ast.parse(source), True, True)


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}
IMPORTS = [
    found
    for name, path in MODULES.items()
    for found in imports_of(path.read_text(encoding="utf-8"), name, is_package=path.name == "__init__.py")
]
OURS = [found for found in IMPORTS if found.is_of("grpo_stage")]


def is_in(module: str, layer_member: str) -> bool:
    return module == layer_member or module.startswith(f"{layer_member}.")


def layer_of(module: str) -> int | None:
    fitting = [(len(member), i) for i, layer in enumerate(LAYERS) for member in layer if is_in(module, member)]
    return max(fitting)[1] if fitting else None


def target(found: Import) -> str:
    """The module of ours that an import loads: `grpo_stage.types.Prompt` -> `types`."""
    name = found.imported.removeprefix("grpo_stage").removeprefix(".")
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def listed(found: list[Import]) -> list[str]:
    return [str(one) for one in found]


def test_the_walk_sees_the_package() -> None:
    assert {
        "types",
        "arguments",
        "trainer",
        "workflow",
        "algorithm.losses",
        "plugin.registration",
        "tools.cli",
    } <= set(MODULES)
    assert any(found.importer == "trainer" and target(found) == "types" for found in OURS)


@pytest.mark.parametrize(
    ("source", "imported", "at_run_time", "at_module_level"),
    [
        ("import vllm.config", "vllm.config", True, True),
        ("from ..types import Prompt", "grpo_stage.types.Prompt", True, True),
        ("from . import seeds", "grpo_stage.rollout.seeds", True, True),
        ("def f():\n    from vllm import LLM", "vllm.LLM", True, False),
        ("try:\n    import vllm\nfinally:\n    pass", "vllm", True, True),
        ("class A:\n    import vllm", "vllm", True, True),
        ("if TYPE_CHECKING:\n    import torch", "torch", False, True),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import torch", "torch", True, True),
    ],
)
def test_the_walk_reads_every_kind_of_import(
    source: str, imported: str, at_run_time: bool, at_module_level: bool
) -> None:
    (found,) = imports_of(source, "rollout.hf")
    assert (found.imported, found.at_run_time, found.at_module_level) == (imported, at_run_time, at_module_level)


def test_every_module_has_a_layer_and_dependencies_point_down() -> None:
    layers = {module: layer_of(module) for module in MODULES if module}
    assert [module for module, layer in layers.items() if layer is None] == []
    both = [(found, layers[found.importer], layers[target(found)]) for found in OURS if target(found)]
    assert listed([found for found, importer, imported in both if imported < importer]) == []


def test_no_circle_of_files() -> None:
    """Whatever imports nothing that is left is taken away, until nothing is or a circle is left."""
    left = {module: {target(found) for found in OURS if found.importer == module} - {module, ""} for module in MODULES}
    while free := [module for module, imported in left.items() if not imported & left.keys()]:
        for module in free:
            del left[module]
    assert sorted(left) == []


def test_only_the_composition_root_knows_the_host_package() -> None:
    above = ("host", "plugin", "board", "workflow", "_autoload", "__main__", "tools")
    wrong = [
        found
        for found in OURS
        if is_in(target(found), "host") and not any(is_in(found.importer, member) for member in above)
    ]
    assert listed(wrong) == []


def test_types_import_none_of_ours() -> None:
    assert listed([found for found in OURS if found.importer == "types"]) == []


def test_arguments_load_no_torch() -> None:
    code = "import sys, grpo_stage.arguments; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_llamafactory_is_imported_only_under_host_plugin_and_board() -> None:
    rooms = ("host", "plugin", "board")
    wrong = [
        found
        for found in IMPORTS
        if found.is_of("llamafactory") and not any(is_in(found.importer, room) for room in rooms)
    ]
    assert listed(wrong) == []


def test_vllm_is_imported_only_by_its_engines_and_never_at_module_level() -> None:
    wrong = [
        found
        for found in IMPORTS
        if found.is_of("vllm")
        and found.importer != "rollout.engines.vllm_cpu_worker"  # which vLLM imports
        and (not found.importer.startswith("rollout.engines.vllm") or (found.at_module_level and found.at_run_time))
    ]
    assert listed(wrong) == []


def test_deepspeed_is_imported_only_where_weights_are_gathered() -> None:
    rooms = ("update.strategies.zero", "update.sharding")
    wrong = [found for found in IMPORTS if found.is_of("deepspeed") and found.importer not in rooms]
    assert listed(wrong) == []


def test_algorithm_imports_torch_alone() -> None:
    allowed = {*sys.stdlib_module_names, "torch"}
    wrong = [
        found
        for found in IMPORTS
        if is_in(found.importer, "algorithm")
        and found.imported.split(".")[0] not in allowed
        and not found.is_of("grpo_stage.algorithm")
    ]
    assert listed(wrong) == []


@pytest.mark.parametrize("module", ["_autoload"])
def test_what_the_interpreter_start_imports_is_standard_library(module: str) -> None:
    wrong = [
        found
        for found in IMPORTS
        if found.importer == module
        and found.at_module_level
        and found.imported.split(".")[0] not in sys.stdlib_module_names
    ]
    assert listed(wrong) == []


def test_the_tools_load_nothing_heavy_for_their_help() -> None:
    heavy = ("torch", "transformers", "llamafactory", "vllm", "gguf")
    wrong = [
        found
        for found in IMPORTS
        if is_in(found.importer, "tools")
        and found.at_module_level
        and found.at_run_time
        and any(found.is_of(name) for name in heavy)
    ]
    assert listed(wrong) == []


def test_importing_the_package_loads_neither_torch_nor_the_host() -> None:
    code = "import sys, grpo_stage; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "grpo_stage" in loaded
    assert loaded.isdisjoint({"torch", "transformers", "llamafactory", "vllm", "trl", "wrapt"})
