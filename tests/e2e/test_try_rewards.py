"""`grpo-stage try-rewards` on a recipe file, with the host's loader."""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_stage.tools import cli


KINDS = ["reference", "wrong_answer", "reference_in_tags", "wrong_answer_in_tags", "truncated", "repeated", "empty"]
RUN_KEYS = ("do_train", "output_dir", "model_name_or_path", "template", "use_cpu")


@pytest.fixture(scope="module", autouse=True)
def _host() -> None:
    """Imported before a test captures its output: the host's log goes to the stdout of this moment for good."""
    import llamafactory.train.tuner  # noqa: F401


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets two of these for its own process, which are put back here; the table is wide enough to read."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("LLAMAFACTORY_VERBOSITY", os.environ.get("LLAMAFACTORY_VERBOSITY", "INFO"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a reward function `f` into the working directory; returns how a recipe names it."""
    monkeypatch.chdir(tmp_path)

    def write(source: str) -> str:
        (tmp_path / "own.py").write_text(source)
        return "own.py:f"

    return write


@pytest.fixture
def run(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., int]:
    """Try the rewards of a recipe; `without` keys, and with others changed. Returns the exit code."""

    def try_rewards(*options: str, without: tuple[str, ...] = RUN_KEYS, **changes: Any) -> int:
        keys = {key: value for key, value in recipe(**changes).items() if key not in without}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(keys))
        return cli.main(["try-rewards", str(tmp_path / "recipe.yaml"), *options, "--json", str(tmp_path / "out.json")])

    return try_rewards


@pytest.fixture
def result(tmp_path: Path) -> Callable[[], dict[str, Any]]:
    return lambda: json.loads((tmp_path / "out.json").read_text())


def test_references_are_tried_without_a_model(
    run: Callable[..., int],
    result: Callable[[], dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    options = ["reward_weights=2.0,1.0", "--rows", "8"]
    assert run(*options, reward_funcs="exact_match,overlong", cutoff_len=4, bf16=True) == 0
    tried = result()
    assert set(tried) == {"functions", "weights", "findings", "notes", "attacks", "constant_answer", "rows"}
    assert tried["findings"] == []
    assert (tried["functions"], tried["weights"]) == (["exact_match", "overlong"], [2.0, 1.0])
    assert len({row["prompt_index"] for row in tried["rows"]}) == 8
    last = [row for row in tried["rows"] if row["prompt_index"] == 7]
    assert [row["kind"] for row in last[: len(KINDS)]] == KINDS
    assert {row["kind"] for row in last[len(KINDS) :]} > {"unsure", "all_numbers", "all_numbers_in_tags", "question"}
    assert [score["kind"] for score in tried["attacks"]][:3] == ["reference", "wrong_answer", "empty"]
    assert all(score["paid_by"] == [] for score in tried["attacks"])
    assert tried["constant_answer"]["num_prompts"] == 10
    assert last[0] == {
        "prompt_index": 7,
        "prompt": "What is 7 + 7?",
        "reference": "14",
        "kind": "reference",
        "completion": "14",
        "num_tokens": 3,
        "rewards": {"exact_match": 1.0, "overlong": 0.0},
        "reward": 2.0,
    }
    by_kind = {row["kind"]: row for row in last}
    assert [by_kind[kind]["completion"] for kind in ("empty", "truncated", "wrong_answer")] == ["", "1", "15"]
    kinds = ("reference", "empty", "truncated", "wrong_answer", "repeated")
    assert [by_kind[kind]["reward"] for kind in kinds] == [2.0, 0.0, 0.0, 0.0, -1.0]
    assert len(tried["notes"]) == 1
    assert "counted in bytes" in tried["notes"][0]

    captured = capsys.readouterr()
    assert "What is 7 + 7?" in captured.out
    assert "wrong_answer" in captured.out
    assert "Note: No model is chosen" in captured.out
    assert "training example" not in captured.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "recipe.yaml"]


def test_the_reward_of_a_game_is_not_tried(run: Callable[..., int], result: Callable[[], dict[str, Any]]) -> None:
    game = "textarena:GuessTheNumber-v0"
    for others in ([], ["accuracy"]):
        assert run(environment=game, reward_funcs=",".join(["environment", *others])) == 0
        assert result()["findings"] == []
        assert any("`environment` is not tried" in note for note in result()["notes"])


def test_each_dataset_of_the_recipe_is_tried(
    run: Callable[..., int], result: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    assert run("--rows", "2", reward_funcs="exact_match", dataset="sums,tens") == 0
    assert list(dict.fromkeys(row["prompt"] for row in result()["rows"])) == ["What is 0 + 0?", "What is 20 + 20?"]


def test_a_function_that_cannot_tell_is_found(
    run: Callable[..., int],
    own: Callable[[str], str],
    result: Callable[[], dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    function = own("def f(completions, answer, value=0.0):\n    return [value] * len(completions)\n")
    assert run(reward_funcs=function, reward_kwargs={"f": {"value": 0.25}}) == 3
    assert {row["rewards"]["f"] for row in result()["rows"]} == {0.25}
    assert "All completions have the same total reward (0.25)" in result()["findings"][0]
    assert "Found: All completions have the same total reward" in capsys.readouterr().out
    assert multiprocessing.active_children() == []


def test_a_function_that_fails_is_shown_with_its_line(
    run: Callable[..., int], own: Callable[[str], str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    function = own("def f(completions):\n    for text in completions:\n        assert text != '3'\n    return [0.0]\n")
    assert run(reward_funcs=f"accuracy,{function}") == 1
    error = capsys.readouterr().err
    message = error[error.index("grpo-stage: ") :]
    assert message.startswith("grpo-stage: reward function 'f': raised AssertionError")
    assert "prompt: What is 1 + 1?\ncompletion: 3\n" in message
    assert f'{tmp_path}/own.py", line 3, in f' in message
    assert error.count("Traceback (most recent call last)") == 1
    assert not (tmp_path / "out.json").exists()
    assert multiprocessing.active_children() == []


def test_a_function_that_hangs_is_ended(
    run: Callable[..., int], own: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    function = own("import time\ndef f(completions):\n    time.sleep(600)\n")
    assert run(reward_funcs=function, reward_timeout=3) == 1
    error = capsys.readouterr().err
    assert "reward function 'f': took longer than 3 s" in error
    assert "line 3 of" in error
    assert multiprocessing.active_children() == []


def test_a_model_s_completions_are_tried_beside_the_references(
    run: Callable[..., int], result: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    """Also in the folder of a run, which is neither refused nor written to."""
    checkpoint = tmp_path / "out" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    assert run("--completions", "model", "--rows", "2", without=("do_train",), reward_funcs="exact_match") == 0
    tried = result()
    kinds = [row["kind"] for row in tried["rows"] if row["prompt_index"] == 1]
    assert "truncated" not in kinds  # of a reference of one character
    assert kinds[-4:] == ["sampled"] * 4
    assert kinds.count("sampled") == 4
    sampled = [row for row in tried["rows"] if row["kind"] == "sampled"]
    assert len({row["completion"] for row in sampled}) > 1
    assert all(1 <= row["num_tokens"] <= 8 for row in sampled)
    assert all("bytes" not in note for note in tried["notes"])
    assert "In 2 of 2 rows all sampled completions earn the same" in tried["notes"][0]
    assert list((tmp_path / "out").rglob("*")) == [checkpoint]


@pytest.mark.parametrize("kind", ["lora", "full", "api"])
def test_a_reward_model_that_is_not_asked_here_is_left_out(
    run: Callable[..., int], result: Callable[[], dict[str, Any]], tmp_path: Path, tiny_model_dir: Path, kind: str
) -> None:
    """A server is asked only where the model is named whose tokens it reads."""
    (tmp_path / "rm").mkdir()
    (tmp_path / "rm" / "adapter_config.json").write_text("{}")
    model = {"lora": str(tmp_path / "rm"), "full": str(tiny_model_dir), "api": "http://127.0.0.1:9/score"}[kind]
    keys = {"reward_model": model, "reward_model_type": kind}
    beside = {"reward_funcs": "exact_match,reward_model", "reward_weights": "2.0,1.0", **keys}
    without = RUN_KEYS if kind == "api" else ("do_train", "output_dir")
    assert run(without=without, **beside) == 0
    assert (result()["functions"], result()["weights"]) == (["exact_match"], [2.0])
    assert any("The reward model is left out" in note for note in result()["notes"])


def test_a_reward_server_is_asked_about_the_completions(
    run: Callable[..., int], result: Callable[[], dict[str, Any]], reward_server_here: Any
) -> None:
    keys = {"reward_model": reward_server_here.url, "reward_model_type": "api", "reward_funcs": None}
    # The server pays length, and so what is wrong, too.
    assert run("--rows", "2", without=("do_train", "output_dir"), **keys) == 3
    rows = result()["rows"]
    texts = {text: float(len(text)) for text in reward_server_here.texts[1:]}
    reference = next(row for row in rows if row["kind"] == "reference")
    (asked,) = [text for text in texts if text.endswith(f"assistant\n{reference['completion']}<|im_end|>\n")]
    assert reference["rewards"] == {"reward_model": texts[asked]}
    assert not any("left out" in note for note in result()["notes"])


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"reward_funcs": None, "reward_model_type": "api"}, "Name `model_name_or_path`"),
        (
            {"reward_funcs": "format,reward_model", "reward_weights": "0,1", "reward_model_type": "api"},
            "add functions",
        ),
        ({"reward_funcs": None, "reward_model": "own/rm"}, "write `reward_model_type: api`"),
    ],
)
def test_a_reward_model_alone_that_is_not_asked_here_is_refused(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], changes: dict[str, Any], remedy: str
) -> None:
    assert run(**{"reward_model": "http://127.0.0.1:9/score", **changes}) == 1
    message = capsys.readouterr().err.rpartition("grpo-stage: ")[2]
    assert "leaves nothing to try" in message
    assert remedy in message


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (["num_generation=4"], {}, "`num_generation` is not a key"),
        (["reward_funcs=acuracy"], {}, "Did you mean 'accuracy'"),
        (["dataset=sum"], {}, "Did you mean `sums`?"),
        (["stage=sft"], {}, "is no recipe of `stage: grpo`"),
        (["--completions", "model"], {}, "`model_name_or_path`, which is missing"),
        (["--rows", "0"], {}, "`--rows 0` must be at least 1"),
        ([], {"model_name_or_path": "no/such-model", "without": ("output_dir",)}, "no/such-model"),
    ],
)
def test_a_mistake_is_told_in_one_message(
    run: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    assert run(*options, **changes) == 1
    captured = capsys.readouterr()
    assert message in captured.err.rpartition("grpo-stage: ")[2]
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_ctrl_c_ends_it_and_is_no_failure_of_the_function(
    recipe: Callable[..., dict[str, Any]], own: Callable[[str], str], tmp_path: Path
) -> None:
    """An object is called in this process, and here it presses the key."""
    function = own(
        "import os, signal, time\nclass Judge:\n    def __call__(self, completions):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n        time.sleep(60)\nf = Judge()\n"
    )
    keys = {key: value for key, value in recipe(reward_funcs=function).items() if key not in RUN_KEYS}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(keys))
    command = [sys.executable, "-m", "grpo_stage.tools.cli", "try-rewards", "recipe.yaml"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 130
    assert "Stopped by SIGINT" in ended.stderr
    assert "KeyboardInterrupt" not in ended.stderr


@pytest.mark.parametrize(("name", "text"), [("list.yaml", "- a\n"), ("torn.yaml", "a: [\n"), ("no.txt", "")])
def test_a_file_that_is_no_recipe_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    assert cli.main(["try-rewards", str(tmp_path / name)]) == 1
    assert f"grpo-stage: {tmp_path / name} " in capsys.readouterr().err


def test_a_file_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["try-rewards", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("os:system", "the module 'os' is of Python's standard library"),
        ("own.py:getoutput", "it is `subprocess.getoutput` of Python's standard library"),
    ],
)
def test_a_recipe_alone_runs_no_program(
    run: Callable[..., int], own: Callable[[str], str], capsys: pytest.CaptureFixture[str], function: str, said: str
) -> None:
    own("from subprocess import getoutput\n")
    name = function.rpartition(":")[2]
    command = {name: {"command" if name == "system" else "cmd": "touch attacked"}}
    assert run(reward_funcs=f"exact_match,{function}", reward_weights="1,0", reward_kwargs=command) == 1
    assert said in capsys.readouterr().err
    assert not Path("attacked").exists()


def test_what_will_run_is_shown(
    run: Callable[..., int], own: Callable[[str], str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    function = own("def f(completions):\n    return [0.0] * len(completions)\n")
    assert run(reward_funcs=function) == 3  # it tells nothing apart
    assert f"Reward code that will run: function `f` of {tmp_path}/own.py, sha256 " in capsys.readouterr().err
