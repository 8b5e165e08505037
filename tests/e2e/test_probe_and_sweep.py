"""`grpo-stage probe` and `grpo-stage sweep` on a recipe file, with the host and the tiny model."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_stage.tools import cli, sweep


pytestmark = pytest.mark.usefixtures("_host", "_environment")


@pytest.fixture(scope="module")
def _host() -> None:
    """Imported before a test captures its output: the host's log goes to the stdout of this moment for good."""
    import llamafactory.train.tuner  # noqa: F401


@pytest.fixture
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands set two of these for their own process; the tables are wide enough to read."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("LLAMAFACTORY_VERBOSITY", os.environ.get("LLAMAFACTORY_VERBOSITY", "INFO"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))


@pytest.fixture
def command(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., int]:
    """Run a subcommand on a recipe with keys changed. Returns the exit code."""

    def run(name: str, *options: str, **changes: Any) -> int:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(**changes)))
        return cli.main([name, str(tmp_path / "recipe.yaml"), *options, "--json", str(tmp_path / "out.json")])

    return run


def test_a_probe_is_one_process(
    command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def seen(arguments: Any) -> None:
        raise ValueError(f"size {arguments.finetuning.vllm_tensor_parallel}")

    monkeypatch.setattr("grpo_stage.host.inputs.load_inputs", seen)
    assert command("probe", rollout_backend="vllm", vllm_tensor_parallel=2) not in (0, 3)
    told = capsys.readouterr().err
    assert "`vllm_tensor_parallel: 2` counts as 1" in told
    assert "size 1" in told


def test_prompts_are_probed_with_the_recipe_s_engine_and_rewards(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reward with many values on a random model: nothing ends within 8 tokens, and gradients can be measured."""
    filtered, picture = tmp_path / "data" / "filtered.jsonl", tmp_path / "probe.png"
    options = ["-n", "6", "-k", "4", "--write", str(filtered), "--picture", str(picture)]
    assert command("probe", *options) == 3
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["num_prompts"], report["num_samples"], report["num_generations"]) == (6, 4, 4)
    assert [one["size"] for one in report["sizes"]] == [2, 4, 8, 16, 32, 64]
    assert report["right"].endswith("the best seen")
    assert report["truncated"] > 0.5
    assert report["length_95"] is None
    assert report["tokens_per_second"] > 0
    assert report["choice"]["best"] in (2, 4, 8, 16, 32, 64)
    advice = [verdict["advice"] for verdict in report["verdicts"]]
    assert advice[:2] == ["raise_max_new_tokens", "learn"]
    assert "max_new_tokens=16" in report["verdicts"][0]["text"]
    kept = {one["index"] for one in report["prompts"] if 0.2 <= one["num_right"] / one["num_samples"] <= 0.8}
    rows = [json.loads(line) for line in filtered.read_text().splitlines()] if kept else []
    assert len(rows) == len(kept)
    assert all(set(row) == {"question", "answer"} for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "=> Raise max_new_tokens" in out
    assert not (tmp_path / "out").exists()  # the run's folder is not touched


def test_a_model_that_is_never_right_needs_a_cold_start(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filtered = tmp_path / "filtered.jsonl"
    assert command("probe", "-n", "99", "-k", "8", "--write", str(filtered), reward_funcs="exact_match") == 3
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["num_prompts"] == 10  # all there are
    assert report["right"] == "`exact_match` is 1"
    assert report["always_wrong"] == 1.0
    assert 0.0 <= report["accuracy"]["low"] <= report["accuracy"]["high"] < 0.2
    assert "cold_start" in [verdict["advice"] for verdict in report["verdicts"]]
    assert report["choice"] is None
    assert "The best one" in report["constant_answer"]
    assert not filtered.exists()
    assert "0 of 10 prompts" in capsys.readouterr().out


def test_a_probe_of_one_sample_is_refused(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert command("probe", "-k", "1") == 1
    assert "`-k 1` must be at least 2" in capsys.readouterr().err


def test_a_setting_that_a_run_refuses_is_refused_before_the_first_starts(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--seeds", "1", "--budget", "steps=1", "--output", str(tmp_path / "sweep")]
    assert command("sweep", "--set", "num_generations=4,1", *options) == 1
    error = capsys.readouterr().err
    assert "With `num_generations=1` the recipe is refused, and no run was started" in error
    assert command("sweep", "--set", "num_generation=4", *options) == 1
    assert "`num_generation` is not a key" in capsys.readouterr().err
    options[3] = "tokens=100"
    assert command("sweep", "--set", "num_generations=4", *options, lr_scheduler_type="cosine") == 1
    assert "`lr_scheduler_type: cosine`" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_runs_get_equal_budgets_and_are_compared(
    command: Callable[..., int],
    run_exp: Callable[[dict[str, Any]], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two settings, of which one fails; then the same command again, which makes the missing run alone."""
    folder, started = tmp_path / "sweep", []
    broken = tmp_path / "broken"

    def run_and_pass_on(command: list[str], stdout: Any, env: dict[str, str], **_: Any) -> Any:
        """The run in this process, since starting one takes seconds."""
        recipe = yaml.safe_load(Path(command[4]).read_text())
        started.append((recipe["num_generations"], *command[5:]))
        if recipe["num_generations"] == 2 and broken.exists():
            stdout.write(b"ValueError: broken\n")
            return type("Result", (), {"returncode": 1})
        with monkeypatch.context() as patch:
            patch.setenv("GRPO_STAGE_BUDGET", env["GRPO_STAGE_BUDGET"])
            run_exp(recipe | dict.fromkeys([word.removesuffix("=true") for word in command[5:]], True))
        return type("Result", (), {"returncode": 0})

    monkeypatch.setattr(sweep, "run_and_pass_on", run_and_pass_on)
    options = ["--set", "num_generations=2,4", "--seeds", "1", "--budget", "tokens=700", "--output", str(folder)]
    broken.touch()
    assert command("sweep", *options) == 3
    assert "num_generations=2-seed=7" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["failures"]["num_generations=2-seed=7"].startswith(
        "exit code 1: ValueError: broken"
    )
    broken.unlink()
    assert command("sweep", *options) == 0
    assert [number for number, *_ in started] == [2, 4, 2]  # the finished run is kept
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["failures"] == {}
    runs = {run["setting"]: run for run in found["runs"]}
    for name, size in (("num_generations=2", 2), ("num_generations=4", 4)):
        log = folder / f"{name}-seed=7" / "trainer_log.jsonl"
        steps = [json.loads(line) for line in log.read_text().splitlines() if "step_time" in line]
        spent = [line["num_tokens"] for line in steps]
        assert spent[-2] < 700 <= spent[-1]
        assert runs[name]["num_tokens"] == spent[-1]
        assert runs[name]["num_steps"] == len(spent)
        assert len(spent) == -(-700 // (spent[0]))  # of equal steps
        assert spent[0] / size == pytest.approx(
            runs["num_generations=4"]["num_tokens"] / runs["num_generations=4"]["num_steps"] / 4, rel=0.05
        )
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    options[5] = "tokens=800"
    assert command("sweep", *options) == 1
    assert "holds another recipe or budget" in capsys.readouterr().err
