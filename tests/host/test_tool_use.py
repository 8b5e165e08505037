"""Tools of a recipe up to its prompts: what these tell, and what is refused before a model is loaded."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from llamafactory.data.template import TEMPLATES, get_template_and_fix_tokenizer
from llamafactory.hparams import DataArguments, ModelArguments, TrainingArguments
from transformers import AutoTokenizer

from grpo_stage.arguments import GRPOArguments
from grpo_stage.host.datasets import PromptData, load_prompts
from grpo_stage.host.parser import parse
from grpo_stage.host.recipe_code import code_names, code_of
from grpo_stage.host.tool_use import ToolUse, load_tool_use, turn_room


FILE = '''
import random


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first.
        b: the second.
    """
    return a + b


class Game:
    def reset(self, low, **row):
        self.secret = random.randint(low, 10 * low)
        return f" It is at least {low}." if low > 2 else None

    def guess(self, number: int) -> str:
        """Guess.

        Args:
            number: the guess.
        """

    def get_reward(self):
        return 1.0


class Unpaid(Game):
    get_reward = None
'''
ROWS = [{"instruction": f"Guess {i}.", "output": str(i), "low": i} for i in (1, 3, 5)]


class Runs:
    """Recipes over a folder."""

    def __init__(self, folder: Path, tokenizer_dir: Path) -> None:
        self.folder, self.tokenizer = folder, AutoTokenizer.from_pretrained(tokenizer_dir)
        self.used: list[ToolUse] = []
        (folder / "my_tools.py").write_text(FILE)

    def load(self, rows: list[dict[str, Any]], columns: dict[str, str] | None = None, **keys: Any) -> PromptData:
        (self.folder / "rows.json").write_text(json.dumps(rows))
        described = {"file_name": "rows.json"} | ({"columns": columns} if columns else {})
        (self.folder / "dataset_info.json").write_text(json.dumps({"rows": described}))
        before = copy.deepcopy(TEMPLATES["qwen3_nothink"])
        data = DataArguments(
            template="qwen3_nothink",
            dataset="rows",
            dataset_dir=str(self.folder),
            cutoff_len=2000,
            overwrite_cache=True,
        )
        self.template = copy.deepcopy(get_template_and_fix_tokenizer(self.tokenizer, data))
        TEMPLATES["qwen3_nothink"] = before
        finetuning = GRPOArguments(**{"reward_funcs": "accuracy"} | keys)
        arguments = SimpleNamespace(data=data, finetuning=finetuning, generating=SimpleNamespace(max_new_tokens=64))
        tool_use = load_tool_use(arguments, self.template, self.tokenizer)  # type: ignore[arg-type]
        if tool_use is not None:
            self.used.append(tool_use)
        training = TrainingArguments(output_dir=str(self.folder / "out"))
        model = ModelArguments(model_name_or_path=str(self.folder), cache_dir=str(self.folder / "cache"))
        return load_prompts(
            self.template,
            self.tokenizer,
            None,
            model,
            data,
            training,
            finetuning,
            tool_use,  # type: ignore[arg-type]
        )

    def text(self, prompt: Any) -> str:
        return str(self.tokenizer.decode(prompt.token_ids))


@pytest.fixture
def runs(tmp_path: Path, short_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    made = Runs(tmp_path, short_tokenizer_dir)
    yield made
    for each in made.used:
        each.worker.close()


def test_prompts_tell_of_tools_and_end_with_what_reset_says(runs):
    data = runs.load(
        ROWS, {"prompt": "instruction", "response": "output"},
        tools="my_tools.py:add", environment="my_tools.py:Game", reward_funcs="environment",
    )  # fmt: skip
    texts = [runs.text(prompt) for prompt in data.train]
    assert all('"name": "add"' in text and '"name": "guess"' in text for text in texts)
    assert [prompt.text for prompt in data.train] == [
        "Guess 1.",
        "Guess 3. It is at least 3.",
        "Guess 5. It is at least 5.",
    ]
    tools = runs.used[0].text
    for prompt in data.train:  # as the host encodes the same words
        messages = [{"role": "user", "content": prompt.text}, {"role": "assistant", "content": ""}]
        assert list(prompt.token_ids) == runs.template.encode_oneturn(runs.tokenizer, messages, "", tools)[0]
    assert [prompt.reference for prompt in data.train] == ["1", "3", "5"]
    assert runs.used[0].settings.tools == ("add", "guess")


@pytest.mark.parametrize(
    ("rows", "columns", "keys", "words"),
    [
        (
            [{"instruction": "?", "output": "!", "low": "x"}], None, {"environment": "my_tools.py:Game"},
            r"`reset` failed for row 1: Error: TypeError.*The row: .*low",
        ),
        (
            [{"instruction": "?", "output": "!"}], None, {"environment": "my_tools.py:Game"},
            "`reset` failed for row 1: .*missing 1 required positional argument: 'low'.*names those that it uses",
        ),
        (
            [{"instruction": "?", "output": "!", "t": '[{"name": "f"}]'}],
            {"prompt": "instruction", "response": "output", "tools": "t"}, {"tools": "my_tools.py:add"},
            "A row has tools of its own.*Leave `tools` out of the `columns`",
        ),
        (
            ROWS, None, {"environment": "my_tools.py:Game", "reward_funcs": "accuracy"},
            "`reward_funcs` does not name `environment`, so that it would have no effect",
        ),
        (
            ROWS, None, {"environment": "my_tools.py:Unpaid"},
            "has no method `get_reward`, which the reward `environment` asks for",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_a_model_is_loaded(runs, rows, columns, keys, words):
    default = {"reward_funcs": "environment"} if "environment" in keys else {}
    with pytest.raises(ValueError, match=f"(?s){words}"):
        runs.load(rows, columns, **default | keys)


def test_a_limit_for_each_turn_makes_room_for_all_of_them(recipe):
    (Path(recipe["model_name_or_path"]).parent / "my_tools.py").write_text(FILE)
    recipe |= {"tools": "my_tools.py:add", "max_turns": 3, "max_new_tokens": 32}
    total = parse(recipe)
    assert (total.generating.max_new_tokens, turn_room(total)) == (32, 32)
    each = parse(recipe | {"completion_limit": "turn"})
    assert (each.generating.max_new_tokens, turn_room(each)) == (96, 32)
    assert each.model.vllm_maxlen == 64 + 96
    with pytest.raises(ValueError, match="leaves no room"):
        parse(recipe | {"completion_limit": "turn", "rollout_backend": "vllm", "vllm_maxlen": 100})


def test_an_environment_is_the_reward_where_no_other_is_named(recipe):
    del recipe["reward_funcs"]
    assert parse(recipe | {"environment": "my_tools.py:Game"}).finetuning.reward_funcs == ["environment"]


def test_the_code_of_tools_is_asked_about_like_that_of_rewards(tmp_path):
    (tmp_path / "my_tools.py").write_text(FILE)
    shared = {"reward_funcs": "accuracy", "tools": "my_tools.py:add", "environment": "my_tools.py:Game"}
    names = code_names(shared)
    assert names == ["my_tools.py:add", "my_tools.py:Game"]
    assert len(code_of(shared, names, tmp_path)) == 2
