"""Mutation testing: every small fault of the mathematics must fail a test, or be listed as no fault at all.

    python tests/mutation/run.py                     all modules (make mutate)
    python tests/mutation/run.py losses kl --jobs 1  two of them

Each mutant is tried in a forked process, in which every import of the module gives the faulty one. There pytest runs
those tests of KILLERS that enter the function at fault, the fastest first, until one fails. The exit code is 1 if a
mutant survives.
"""

import argparse
import fnmatch
import gc
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from gc import freeze  # tests/conftest.py puts another in its place
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest
from operators import Mutant, mutants


ROOT = Path(__file__).parents[2]
EQUIVALENT = Path(__file__).with_name("equivalent.txt")
FORMULAS = (
    "test_algorithm_oracle.py",
    "test_objective_oracle.py",
    "test_trust_region_oracle.py",
    "test_estimator_oracle.py",
    "test_rejection_oracle.py",
    "test_ratio_overflow.py",
    "test_formula_edges.py",
    "test_routing_oracle.py",
)
OBJECTIVE = ("test_objective_terms.py", "test_ratio_overflow.py")
# Pattern of modules -> the files of tests that must notice; the first pattern that fits.
KILLERS: dict[str, tuple[str, ...]] = {
    **{f"algorithm/{name}.py": () for name in ("catalog", "combinations", "conditions")},  # no formulas
    "algorithm/*.py": FORMULAS,
    "update/objective.py": OBJECTIVE,
    "update/terms/*.py": OBJECTIVE,
    "update/gradient.py": ("test_objective_terms.py", "test_canary.py", "test_batch_and_policy.py"),
    "update/credit.py": ("test_metrics.py", "test_objective.py"),
    "records/metrics.py": ("test_metrics.py", "test_metric_tracker.py"),
}
# A loop that never ends is noticed as well.
PYTEST = ["-q", "-o", "timeout=120"]
PYTEST += [f"-pno:{plugin}" for plugin in ("cacheprovider", "logging", "unraisableexception", "threadexception")]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("modules", nargs="*", help="names of modules, as `losses`; by default all")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    modules = [path for path in _modules() if not options.modules or path.stem in options.modules]
    if not modules:
        parser.error(f"no such module: {options.modules}")
    listed = _equivalents()
    with tempfile.TemporaryDirectory(prefix="grpo-stage-mutation-") as scratch:
        os.environ |= {"TMPDIR": scratch, "OMP_NUM_THREADS": "1"}
        os.chdir(ROOT)
        _import_what_tests_import(modules)
        results = [(path, *_try_module(path, listed, options.jobs)) for path in modules]
    for path, survivors, _ in results:
        for mutant in survivors:
            print(f"SURVIVED {path.stem}.{mutant.name}    ({path.relative_to(ROOT)}:{mutant.line})")
    tried = {path.stem for path in modules}
    for key in sorted(listed - set().union(*(used for *_, used in results))):
        if key.split(".")[0] in tried:
            print(f"Listed as equivalent, and no longer there: {key}")
    survived = sum(len(survivors) for _, survivors, _ in results)
    print(f"{survived} survived")
    return min(survived, 1)


def _modules() -> Iterator[Path]:
    for path in sorted((ROOT / "grpo_stage").rglob("*.py")):
        if path.name != "__init__.py" and _killers(path):
            yield path


def _killers(path: Path) -> list[str]:
    relative = str(path.relative_to(ROOT / "grpo_stage"))
    files = next((files for pattern, files in KILLERS.items() if fnmatch.fnmatch(relative, pattern)), ())
    return [str(ROOT / "tests/unit" / file) for file in files]


def _equivalents() -> set[str]:
    """The lines of equivalent.txt but for its comments, which give the reasons."""
    lines = map(str.strip, EQUIVALENT.read_text(encoding="utf-8").splitlines())
    return {line for line in lines if line and not line.startswith("#")}


def _import_what_tests_import(modules: list[Path]) -> None:
    """All but this repository's own, once for all processes."""
    files = sorted({file for path in modules for file in _killers(path)})
    if pytest.main([*PYTEST, "-qq", "--collect-only", *files]) != 0:
        sys.exit("the tests cannot be collected")
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith((f"{ROOT}/grpo_stage", f"{ROOT}/tests/unit")):
            del sys.modules[name]
    gc.collect()
    freeze()


def _try_module(path: Path, listed: set[str], jobs: int) -> tuple[list[Mutant], set[str]]:
    """Those that survive, and the keys of those that are listed as equivalent."""
    source, started = path.read_text(encoding="utf-8"), time.monotonic()
    everyone = list(mutants(source))
    used = {f"{path.stem}.{mutant.name}" for mutant in everyone} & listed
    waiting = [mutant for mutant in everyone if f"{path.stem}.{mutant.name}" not in listed]
    survey = Survey(path)
    if os.waitpid(_start(path, source, survey), 0)[1] != 0:
        sys.exit(f"{path}: a test fails without any fault")
    tests = survey.result()
    said = time.monotonic()
    print(f"{path.relative_to(ROOT)}: {len(waiting)} mutants, {len(used)} equivalent, {len(tests)} tests of "
          f"{said - started:.0f} s", flush=True)  # fmt: skip
    running: dict[int, Mutant] = {}
    survivors: list[Mutant] = []
    for number, mutant in enumerate([*waiting, None]):
        while running and (mutant is None or len(running) == jobs):
            process, status = os.wait()
            tried = running.pop(process)
            if status == 0:
                survivors.append(tried)
                print(f"  survived: {tried.name}", flush=True)
        if mutant is not None:
            running[_start(path, mutant.source, Killer(mutant, tests))] = mutant
        if time.monotonic() - said > 20 or mutant is None:
            said = time.monotonic()
            print(f"  {number} tried, {len(survivors)} survived, {said - started:.0f} s", flush=True)
    return survivors, used


def _start(path: Path, source: str, plugin: object) -> int:
    """A process that ends with 0 if the tests pass while `source` stands in the place of the module's own."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        compiled = compile(source, str(path), "exec")
        of_file = SourceFileLoader.get_code
        SourceFileLoader.get_code = lambda self, of: compiled if of == name else of_file(self, of)  # type: ignore
        if not os.environ.get("SHOW"):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
        code = int(pytest.main([*PYTEST, *_killers(path)], plugins=[plugin]))
    finally:
        os._exit(code)


class Survey:
    """Notes of each test its seconds and the functions of a module that it enters."""

    def __init__(self, path: Path) -> None:
        self.file = Path(os.environ["TMPDIR"]) / f"{path.stem}.json"
        self.path = str(path)
        self.tests: dict[str, tuple[float, list[str]]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        entered: set[str] = set()

        def trace(frame: Any, event: str, argument: object) -> None:
            if frame.f_code.co_filename == self.path:
                entered.add(_scope_of(frame.f_code.co_qualname))

        started = time.monotonic()
        sys.settrace(trace)
        threading.settrace(trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            self.tests[item.nodeid] = time.monotonic() - started, sorted(entered)

    def pytest_sessionfinish(self) -> None:
        self.file.write_text(json.dumps(self.tests))

    def result(self) -> dict[str, tuple[float, list[str]]]:
        return json.loads(self.file.read_text())


def _scope_of(qualname: str) -> str:
    """As `operators` has it: without lambdas and comprehensions."""
    return ".".join(part for part in qualname.split(".") if not part.startswith("<"))


class Killer:
    """Runs what enters the function at fault, or everything for what is done at import, and ends the process at the
    first failure."""

    def __init__(self, mutant: Mutant, tests: dict[str, tuple[float, list[str]]]) -> None:
        scope = mutant.name.split(":")[0]
        entering = {name: seconds for name, (seconds, scopes) in tests.items() if scope in scopes}
        self.seconds = entering or {name: seconds for name, (seconds, _) in tests.items()}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self.seconds), key=lambda item: self.seconds[item.nodeid]
        )

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            os._exit(1)

    pytest_runtest_logreport = pytest_collectreport


if __name__ == "__main__":
    sys.exit(main())
