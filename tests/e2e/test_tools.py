"""Whole runs with tools and an environment, on the tiny model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from llamafactory.data import tool_utils

from .conftest import completions, trainer_log
from .test_interruptions import assert_same


FILE = '''
import random


def shout(text: str) -> str:
    """Say it louder.

    Args:
        text: what to say.
    """
    if "e" in text:
        raise ValueError("no e, please")
    return text.upper()[:4] + str(random.randrange(10))


class Counter:
    def reset(self, question, **row):
        self.total = random.randrange(100)
        return f" Start at {self.total}."

    def count(self, text: str) -> int:
        """Count letters.

        Args:
            text: whose letters are counted.
        """
        self.total += len(text) + random.randrange(3)
        return self.total

    def get_reward(self) -> float:
        return self.total % 7
'''


class Always(tool_utils.DefaultToolUtils):
    """A format in which most of what a model without any training writes is a call."""

    @staticmethod
    def function_formatter(functions: list[tool_utils.FunctionCall]) -> str:
        return f"CALL {functions[0].name} {functions[0].arguments}"

    @staticmethod
    def tool_extractor(content: str) -> str | list[tool_utils.FunctionCall]:
        if content.startswith("CALL "):
            _, name, arguments = content.split(" ", 2)
            return [tool_utils.FunctionCall(name, arguments)]
        if len(content) % 3 == 0:
            return content
        return [tool_utils.FunctionCall("count" if len(content) % 2 else "shout", json.dumps({"text": content}))]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tool_utils.TOOLS, "always", Always())


@pytest.fixture(scope="module")
def ending_model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an end token in four: it ends its turns by chance."""
    folder = tmp_path_factory.mktemp("ending") / "model"
    shutil.copytree(tiny_model_dir, folder)
    file = folder / "generation_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"eos_token_id": list(range(3, 2048, 4))}))
    return folder


def test_a_run_with_tools_and_an_environment_goes_on_exactly(recipe, run_exp, always, ending_model_dir, tmp_path):
    file = tmp_path / "my_tools.py"
    file.write_text(FILE)
    settings: dict[str, Any] = {
        "model_name_or_path": str(ending_model_dir),
        "tools": f"{file}:shout",
        "environment": f"{file}:Counter",
        "tool_format": "always",
        "reward_funcs": "environment",
        "max_turns": 3,
        "max_new_tokens": 96,
        "cutoff_len": 400,
        "max_steps": 5,
        "steps_per_generation": 2,
        "learning_rate": 1e-2,
        "log_completions": True,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "eval_dataset": "tens",
        "eval_num_generations": 2,
        "beta": 0.01,
    }
    whole, broken = (recipe(output_dir=str(tmp_path / name), **settings) for name in ("whole", "broken"))
    run_exp(whole)
    rows = completions(whole["output_dir"])
    assert all(" Start at " in row["prompt"] for row in rows)
    assert {len(row["turns"]) for row in rows} >= {1, 3, 5}
    results = [turn for row in rows for turn in row["turns"] if turn["role"] == "tool"]
    assert any(turn.get("num_errors") and "no e, please" in turn["text"] for turn in results)
    assert any(turn["text"].isdecimal() for turn in results)
    assert len({row["reward"] for row in rows}) > 3
    log = [line for line in trainer_log(whole["output_dir"]) if "loss" in line]
    sampled = [line for line in log if "reward" in line]
    assert len(sampled) == 3  # of two steps each
    for line in sampled:
        assert 1 < line["completions/mean_turns"] < 3
        assert 0 < line["tools/failure_frequency"] < 1
        assert line["sampling/sampling_logp_difference/mean"] < 1e-4  # the trainer reads what the engine read
    assert any("eval_rewards/environment/mean@2" in line for line in trainer_log(whole["output_dir"]))

    # From between the two uses of a rollout: the checkpoint holds its completions.
    shutil.copytree(Path(whole["output_dir"], "checkpoint-3"), Path(broken["output_dir"], "checkpoint-3"))
    for log_file in ("trainer_log.jsonl", "completions.jsonl"):
        shutil.copy(Path(whole["output_dir"], log_file), broken["output_dir"])
    run_exp(broken)
    assert_same(broken, whole)
