"""The slope test in bf16, with both engines: each fault of delivery is found, and a sound one never alarms.

Runs of `benchmarks/canary_faults.py`, few and short: bf16 is slow on a CPU. Its table over learning rates and 200
sound steps is in docs/metrics.md.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "canary_faults.py"
spec = importlib.util.spec_from_file_location("canary_faults", BENCHMARK)
assert spec is not None
assert spec.loader is not None
canary_faults = importlib.util.module_from_spec(spec)
spec.loader.exec_module(canary_faults)


CASES = {
    "vllm, lora": {"none": 8, "base": 4, "half": 8, "twice": 4, "one behind": 8},
    "vllm, full": {"none": 4, "half": 8, "one behind": 8},
    "hf, lora": {"one behind": 8},
}
"""The sync by which each fault must be found, in runs of that many syncs."""


@pytest.fixture(scope="module")
def start_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One engine at a time, kept for as long as tests ask for the same."""
    folder = tmp_path_factory.mktemp("bf16")
    model = canary_faults.tiny_model(folder)
    running: dict[str, Any] = {}

    def start(kind: str) -> tuple[Any, Any, str]:
        backend, tuning = kind.split(", ")
        if kind not in running:
            for engine in running.values():
                engine.close()
            running.clear()
            running[kind] = canary_faults.start_engine(backend, str(folder), tuning, canary_faults.VOCABULARY)
        return running[kind], model, tuning

    yield start
    for engine in running.values():
        engine.close()


@pytest.mark.parametrize(
    ("kind", "fault", "limit"), [(k, *case) for k, cases in CASES.items() for case in cases.items()]
)
def test_each_fault_is_found_soon_after_it_is_there(start_engine, kind, fault, limit):
    engine, model, tuning = start_engine(kind)
    found, figures = canary_faults.run(engine, model, tuning, 3e-3, fault, limit, "cpu")
    if fault == "none":
        assert found is None
        assert 0.4 < figures["sampling/slope/start"] < 1.1
    else:
        assert found is not None, figures
        assert found > 0, "nothing has moved at the first sync"
