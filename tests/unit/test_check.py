"""`grpo-stage check`: what a run would do and refuse, without weights."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_stage.tools import cli
from grpo_stage.tools.check import Arithmetic


@pytest.fixture(scope="module", autouse=True)
def _host() -> None:
    """Imported before a test captures its output: the host's log goes to the stdout of this moment for good."""
    import llamafactory.train.tuner  # noqa: F401


@pytest.fixture
def check(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Check a recipe with these changes; 45 of its 60 rows have the answer 1."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("LLAMAFACTORY_VERBOSITY", "WARNING")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    rows = [{"question": f"What is {i}?", "answer": "1" if i % 4 else str(i)} for i in range(60)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    columns = {"prompt": "question", "response": "answer"}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json", "columns": columns}}))
    keys = {
        "stage": "grpo",
        "do_train": True,
        "model_name_or_path": str(tiny_model_dir),
        "template": "smollm2",
        "finetuning_type": "lora",
        "dataset": "rows",
        "dataset_dir": str(tmp_path),
        "cutoff_len": 64,
        "max_new_tokens": 8,
        "num_generations": 4,
        "reward_funcs": "accuracy",
        "rollout_backend": "hf",
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2.0,
        "use_cpu": True,
        "report_to": "none",
    }

    def run(words: Sequence[str] = (), **changes: Any) -> int:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**keys, **changes}))
        return cli.main(["check", str(tmp_path / "recipe.yaml"), "--json", str(tmp_path / "out.json"), *words])

    return run


def test_a_recipe_is_told_in_words(
    check: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    assert check(top_p=0.9) == 3  # for the constant answer
    result = json.loads((tmp_path / "out.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "out.json", "recipe.yaml"])
    numbers = result["arithmetic"]
    assert (numbers["prompts_per_step"], numbers["completions_per_step"], numbers["steps_per_epoch"]) == (4, 16, 15)
    assert (numbers["num_steps"], numbers["num_prompts"], numbers["sampled_tokens_per_step"]) == (30, 60, 128)
    assert [prompt["reference"] for prompt in result["prompts"]] == ["0", "1"]
    assert "<|im_start|>user\nWhat is 0?<|im_end|>" in result["prompts"][0]["text"]
    assert len(result["prompts"][0]["token_ids"]) > 10
    assert result["written"]["rollout"]["top_p"] == 0.9
    assert result["written"]["others"]["use_cpu"] is True
    assert result["defaults"]["rollout"]["temperature"] == 1.0
    assert "learning_rate" in result["defaults"]["training"]
    assert result["constant_answer"]["answer"] == "1"
    assert result["constant_answer"]["share"] == pytest.approx(46 / 60, abs=0.02)
    assert "The answer '1' to every prompt" in result["findings"][0]
    assert any("`top_p: 0.9`" in warning for warning in result["warnings"])
    shown = capsys.readouterr().out
    assert "a run would start" in shown
    assert "A step: 4 prompts x 4 completions = 16 completions" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_generation": 4}, "`num_generation` is not a key"),
        ({"lora_target": "no_layer"}, "the model has no layer `no_layer`"),  # by the model's skeleton
        ({"reference_column": "gold"}, "gold"),  # by the rows
        ({"template": "llama3"}, "no embedding"),  # by the tokens
        ({"reward_funcs": "regex"}, "pattern"),  # by the rewards
        ({"output_dir": "recipe.yaml/out"}, "which is a file"),
    ],
)
def test_what_a_run_refuses_before_its_weights_is_refused(
    check: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert check(**changes) == 1
    assert message in capsys.readouterr().err.rpartition("grpo-stage: ")[2]
    (problem,) = json.loads((tmp_path / "out.json").read_text())["problems"]
    assert message in problem["text"]


def test_the_arithmetic_of_reused_rollouts_and_dynamic_sampling() -> None:
    numbers = Arithmetic(
        num_devices=1,
        prompts_per_step=8,
        completions_per_step=64,
        prompts_per_rollout=32,
        uses_of_rollout=8,
        sampled_tokens_per_step=64 * 100,
        num_prompts=1000,
        mean_prompt_tokens=40.4,
        max_prompt_tokens=64,
        steps_per_epoch=250,
        num_steps=500,
        num_epochs=2.0,
        is_upper_bound=True,
    )
    step, rollout, data, whole = numbers.sentences(8, 100)
    assert step.startswith("A step: 8 prompts x 8 completions = 64 completions of at most 100 tokens")
    assert "at most 6,400 sampled tokens" in step
    assert rollout == "A rollout of 32 prompts serves 8 steps."
    assert data == "The data: 1,000 prompts of 40 tokens in the mean, 64 at most."
    assert whole == "The run: at most 250 steps an epoch, at most 500 steps in all, at most 2 epochs."


def test_all_problems_are_said_at_once(
    check: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of types, bounds, relations, rewards and rows, though the rows are read only once the keys are right."""
    changes = {
        "num_generatoins": 4,
        "learning_rate": "fast",
        "epsilon": 2,
        "num_generations": 1,
        "top_p": 3,
        "num_completions_to_print": 3,
        "loss_type": "sap",
        "sapo_temperature_pos": 2,  # nothing is wrong with it beside the loss that was meant
        "reward_funcs": "accuracy,nowhere.py:score",
        "reference_column": "gold",
        "eval_dataset": "absent",
        "eval_strategy": "steps",
        "reward_kwargs": {"accuracy": {"api_key": "my-own-5ecret-1"}},
    }
    assert check(**changes) == 1
    problems = json.loads((tmp_path / "out.json").read_text())["problems"]
    about = [problem["keys"][0] if problem["keys"] else problem["text"] for problem in problems]
    assert sorted(about) == [
        *("epsilon", "eval_dataset", "learning_rate", "loss_type", "num_completions_to_print", "num_generations"),
        *("num_generatoins", "reference_column", "reward_funcs", "top_p"),
    ]
    said = capsys.readouterr().err
    assert "10 problems:\n1. `num_generatoins` is not a key" in said
    assert "5ecret" not in said + json.dumps(problems)


_EVALUATION = {
    **{"eval_dataset": "rows", "eval_strategy": "steps", "eval_steps": 5, "eval_num_generations": 2},
    **{"save_steps": 5, "load_best_model_at_end": True, "metric_for_best_model": "eval_rewards/accuracy/mean@2"},
}


@pytest.mark.parametrize(
    ("others", "key", "wrong"),
    [
        # what an accepted value would have brought: rewards, a dataset
        ({"dataset": None, "reward_funcs": None}, "environment", "textarena:No-v0"),
        ({"dataset": None, "reward_funcs": None}, "environment", True),
        ({"reward_funcs": None, "max_turns": 3}, "environment", "nowhere.py:Class"),
        ({"max_turns": 3, "tool_timeout": 5.0}, "tools", "nowhere.py:function"),
        # what an accepted value would have had to do with other keys
        ({"kl_estimator": "k2", "kl_in_reward": True}, "beta", -1),
        ({"max_recoveries": 2}, "on_alarm", "shout"),
        ({"epsilon": 0.2}, "epsilon_high", -1),
        ({}, "val_size", -7),
        ({}, "report_to", [["wandb"]]),
        ({"rollout_backend": "vllm"}, "vllm_max_lora_rank", -8),
        ({"reward_kwargs": {"length": {"max_length": 9}}, "dynamic_sampling": True}, "reward_funcs", "lenght"),
        ({"reward_weights": "1.0,0.5"}, "reward_funcs", "nowhere.py:score"),
        ({"dataset_kwargs": {"leg_counting": {"size": 9}}}, "dataset", "absent"),
        (_EVALUATION, "eval_num_generations", -2),
        (_EVALUATION, "eval_num_generations", "two"),
        (_EVALUATION, "eval_steps", -5),
        (_EVALUATION, "reward_funcs", "acuracy"),
    ],
)
def test_one_fault_is_told_once(
    check: Callable[..., int], tmp_path: Path, others: dict[str, Any], key: str, wrong: Any
) -> None:
    """What would not be said of any accepted value is no second problem."""
    assert check(**{**others, key: wrong}) == 1
    (problem,) = json.loads((tmp_path / "out.json").read_text())["problems"]
    assert problem["keys"][:1] == [key]


def test_all_that_is_known_before_a_run_in_one_file(check: Callable[..., int], tmp_path: Path) -> None:
    assert check(words=["--all"]) == 3  # for the constant answer
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["is_whole"]
    assert result["problems"] == []
    assert result["memory"]["fits"] is True
    assert {"reference", "wrong_answer", "empty"} <= {row["kind"] for row in result["rewards"]["rows"]}
