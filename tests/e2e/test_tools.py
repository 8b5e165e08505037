"""Whole runs with tools and an environment, on the tiny model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from llamafactory.data import tool_utils

from .conftest import completions, recipe_file, trainer_log
from .test_interruptions import assert_same
from .tool_ranks import FORMATS


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


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, tool_format in FORMATS.items():
        monkeypatch.setitem(tool_utils.TOOLS, name, tool_format)


@pytest.fixture(scope="module")
def ending_model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an end token in four, so that it ends its turns by chance, and more positions."""
    folder = tmp_path_factory.mktemp("ending") / "model"
    shutil.copytree(tiny_model_dir, folder)
    changes: dict[str, dict[str, Any]] = {
        "generation_config.json": {"eos_token_id": list(range(3, 2048, 4))},
        "config.json": {"max_position_embeddings": 2048},  # the rules of a game are long
    }
    for name, change in changes.items():
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return folder


@pytest.fixture
def settings(ending_model_dir, tmp_path) -> dict[str, Any]:
    file = tmp_path / "my_tools.py"
    file.write_text(FILE)
    return {
        "model_name_or_path": str(ending_model_dir),
        "tools": f"{file}:shout",
        "environment": f"{file}:Counter",
        "tool_format": "always",
        "reward_funcs": "environment",
        "max_turns": 3,
        "max_new_tokens": 96,
        "cutoff_len": 400,
        "learning_rate": 1e-2,
        "log_completions": True,
        "logging_steps": 1,
        "beta": 0.01,
    }


@pytest.mark.parametrize("backend", ["hf", "vllm"])
def test_a_run_with_tools_and_an_environment_goes_on_exactly(recipe, run_exp, always, settings, tmp_path, backend):
    settings |= {
        "rollout_backend": backend,
        "max_steps": 5,
        "steps_per_generation": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "eval_dataset": "tens",
        "eval_num_generations": 2,
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


def test_two_processes_play_the_episodes_of_one(recipe, settings, host_processes, tmp_path):
    """Same turns, results, rewards and weights, whichever process an episode is played in."""
    runs = {}
    for num_ranks, batch_size in ((2, 1), (1, 2)):
        run = recipe(
            output_dir=str(tmp_path / str(num_ranks)), per_device_train_batch_size=batch_size, max_steps=2, **settings
        )
        script = str(Path(__file__).with_name("tool_ranks.py"))
        for result in host_processes.run_ranks(num_ranks, script, recipe_file(run)):
            assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
        runs[num_ranks] = run["output_dir"]
    rows = {
        num_ranks: sorted(
            (row["step"], row["prompt_index"], row["reward"], json.dumps(row["turns"])) for row in completions(folder)
        )
        for num_ranks, folder in runs.items()
    }
    assert rows[2] == rows[1]
    assert len({index for _, index, *_ in rows[2]}) == 4
    assert any('"role": "tool"' in turns for *_, turns in rows[2])
    logs = [[line for line in trainer_log(folder) if "loss" in line] for folder in runs.values()]
    for two, one in zip(*logs, strict=True):
        for name in ("reward", "completions/mean_turns", "tools/call_frequency", "tools/failure_frequency"):
            assert two[name] == pytest.approx(one[name], rel=1e-6), name
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-3)


def test_a_game_of_textarena_is_played_without_a_dataset(recipe, run_exp, always, settings, tmp_path):
    run = recipe(
        **settings
        | {
            "output_dir": str(tmp_path / "out"),
            "environment": "textarena:GuessTheNumber-v0",
            "tool_format": "moves",
            "max_samples": 4,
            "cutoff_len": 1000,
            "max_new_tokens": 400,
            "max_turns": 6,
        }
    )
    for key in ("tools", "dataset", "dataset_dir", "reward_funcs"):
        del run[key]
    run_exp(run)
    rows = completions(run["output_dir"])
    assert all("between 1 and 20" in row["prompt"] for row in rows)
    results = [turn["text"] for row in rows for turn in row["turns"] if turn["role"] == "tool"]
    assert any(text.startswith("The target number is ") for text in results)
    over = [row for row in rows if any("The game is over." in turn["text"] for turn in row["turns"])]
    assert over
    assert len({row["reward"] for row in rows}) > 2
    assert all(0 <= row["reward"] <= 1 for row in rows)
