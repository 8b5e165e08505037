"""The host's datasets as prompts: against the host's own processor, token for token, and what it drops."""

import copy
import json
import pickle
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, Literal

import pytest
from datasets import Dataset, Features, Image, Value
from llamafactory.data import converter, loader
from llamafactory.data import template as host_template
from llamafactory.hparams import DataArguments, ModelArguments, TrainingArguments
from PIL import Image as PILImage
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from grpo_stage.arguments import GRPOArguments
from grpo_stage.host import datasets as prompt_datasets
from grpo_stage.host.datasets import PromptData, load_prompts


CHAT_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function",
    "system_tag": "system",
}
CHAT_COLUMNS = {"messages": "messages"}
TOOLS = json.dumps(
    [
        {
            "name": "add",
            "description": "Adds two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "number", "description": "one"}, "b": {"type": "number"}},
                "required": ["a"],
            },
        }
    ]
)


@pytest.fixture(scope="module")
def base_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with merges, so that where a template puts its borders shows in the ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = ["user assistant system What is one plus two? Answer with the number only. think tool_response\n"] * 3
    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<start_of_turn>", "[INST]"]
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


class Workspace:
    """A dataset folder, and the host's arguments over it."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.tokenizer = copy.deepcopy(tokenizer)
        self.monkeypatch = monkeypatch
        self.info: dict[str, dict[str, Any]] = {}

    def write(self, name: str, rows: list[dict[str, Any]], **info: Any) -> str:
        (self.folder / f"{name}.json").write_text(json.dumps(rows))
        return self.register(name, f"{name}.json", **info)

    def register(self, name: str, file_name: str, **info: Any) -> str:
        self.info[name] = {"file_name": file_name, **info}
        (self.folder / "dataset_info.json").write_text(json.dumps(self.info))
        return name

    def chat(self, name: str, rows: list[dict[str, Any]], formatting: str = "sharegpt", **columns: str) -> str:
        return self.write(name, rows, formatting=formatting, tags=CHAT_TAGS, columns=CHAT_COLUMNS | columns)

    def arguments(self, dataset: str | None, template: str = "default", **data: Any) -> dict[str, Any]:
        # The host keeps one object a template and writes the run's settings into it.
        fresh = copy.deepcopy(host_template.TEMPLATES[template])
        self.monkeypatch.setitem(host_template.TEMPLATES, template, fresh)
        data_args = DataArguments(dataset=dataset, dataset_dir=str(self.folder), template=template, **data)
        return {
            "template": host_template.get_template_and_fix_tokenizer(self.tokenizer, data_args),
            "tokenizer": self.tokenizer,
            "processor": None,
            "model_args": ModelArguments(model_name_or_path="unused"),
            "data_args": data_args,
            "training_args": TrainingArguments(output_dir=str(self.folder / "out"), use_cpu=True, report_to="none"),
        }

    def load(
        self,
        dataset: str | None,
        template: str = "default",
        reference_column: str | None = None,
        overlong_prompts: Literal["drop", "truncate"] = "drop",
        reward_columns: dict[str, str] | None = None,
        **data: Any,
    ) -> PromptData:
        ours = GRPOArguments(
            reference_column=reference_column, overlong_prompts=overlong_prompts, reward_columns=reward_columns
        )
        return load_prompts(**self.arguments(dataset, template, **data), finetuning_args=ours)

    def host_ids(self, dataset: str, template: str = "default", **data: Any) -> list[tuple[int, ...]]:
        """The prompts' token ids as the host's own loader and processor give them."""
        module = loader.get_dataset(**self.arguments(dataset, template, **data), stage="ppo")
        return [tuple(ids) for ids in module["train_dataset"]["input_ids"]]


@pytest.fixture
def workspace(tmp_path: Path, base_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    return Workspace(tmp_path, base_tokenizer, monkeypatch)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(prompt_datasets.logger, "warning_rank0", said.append, raising=False)
    return said


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def conversations(answer: str) -> list[dict[str, Any]]:
    """Single- and multi-turn, with and without system, tools and an earlier thought."""
    question, call = turn("user", "What is one plus two?"), json.dumps({"name": "add", "arguments": {"a": 1, "b": 2}})
    thought = turn("assistant", "<think>\n1+2\n</think>\n\nThree.")
    final = [turn("user", "And what is 12 + 30? Answer with the number only."), turn("assistant", answer)]
    system = turn("system", "Be brief.")
    rows = [
        [question, turn("assistant", answer)],
        [system, question, turn("assistant", answer)],
        [question, thought, *final],
        [system, question, thought, turn("user", "  Why?\n"), turn("assistant", "Because."), *final],
        [question, turn("function", call), turn("tool", '{"sum": 3}'), turn("assistant", answer)],
    ]
    return [{"messages": messages, "tools": tools} for messages in rows for tools in ("", TOOLS)]


TEMPLATES = [
    ("smollm2", {}),
    ("qwen3", {"enable_thinking": True}),
    ("qwen3", {"enable_thinking": False}),
    ("qwen3", {"enable_thinking": None}),
    ("qwen3", {"enable_thinking": True, "preserve_thinking": True}),
    ("qwen3_nothink", {}),
    ("llama2", {}),
    ("llama3", {}),
    ("gemma", {}),
    ("deepseek3", {}),
    ("deepseekr1", {"enable_thinking": False}),
    ("mistral", {}),
    ("glm4", {}),
    ("default", {}),
    ("smollm2", {"default_system": "Count."}),
]


@pytest.mark.parametrize(("template", "settings"), TEMPLATES)
def test_token_ids_are_the_hosts(workspace: Workspace, template: str, settings: dict[str, Any]):
    rows = conversations("Forty-two.")
    dataset = workspace.chat("chat", rows, tools="tools")
    prompts = workspace.load(dataset, template, **settings).train
    expected = workspace.host_ids(dataset, template, **settings)
    assert [prompt.token_ids for prompt in prompts] == expected
    assert len(set(expected)) == len(rows)
    assert {prompt.reference for prompt in prompts} == {"Forty-two."}


@pytest.mark.parametrize("template", ["qwen3", "deepseekr1"])
@pytest.mark.parametrize("thinking", [True, False, None])
def test_the_reference_never_shapes_the_prompt(workspace: Workspace, template: str, thinking: bool | None):
    """The host's prompt depends on whether the answer holds a thought: ours is the host's for an empty answer."""
    answer = "<think>\nThirty and twelve.\n</think>\n\n42"
    with_thought = workspace.chat("thought", conversations(answer), tools="tools")
    without_answer = workspace.chat("empty", conversations(""), tools="tools")
    prompts = workspace.load(with_thought, template, enable_thinking=thinking).train
    expected = workspace.host_ids(without_answer, template, enable_thinking=thinking)
    assert [prompt.token_ids for prompt in prompts] == expected
    assert {prompt.reference for prompt in prompts} == {answer}
    if thinking is None:
        assert expected != workspace.host_ids(with_thought, template, enable_thinking=None)


def test_the_openai_format_is_the_hosts(workspace: Workspace):
    rows = conversations("42")
    rows = [row | {"messages": [m | {"tool_calls": None} for m in row["messages"]]} for row in rows]
    dataset = workspace.chat("openai", rows, formatting="openai", tools="tools")
    prompts = workspace.load(dataset, "llama3").train
    assert [prompt.token_ids for prompt in prompts] == workspace.host_ids(dataset, "llama3")
    assert {prompt.reference for prompt in prompts} == {"42"}


def test_alpaca_with_history_and_system(workspace: Workspace):
    rows: list[dict[str, Any]] = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "about": "Be brief.", "past": [["Hi", "Hello"]]},
        {"instruction": "Add.", "input": "", "output": "9", "about": "", "past": []},
    ]
    columns = {"prompt": "instruction", "query": "input", "response": "output", "system": "about", "history": "past"}
    dataset = workspace.write("alpaca", rows, columns=columns)
    first, second = workspace.load(dataset, "smollm2").train
    assert [first.token_ids, second.token_ids] == workspace.host_ids(dataset, "smollm2")
    assert first.messages == (
        turn("system", "Be brief."),
        turn("user", "Hi"),
        turn("assistant", "Hello"),
        turn("user", "Add.\n1 and 2"),
    )
    assert second.messages == (turn("user", "Add."),)
    assert (first.text, first.reference, second.reference) == ("Add.\n1 and 2", "3", "9")
    assert first.columns == rows[0]


PROMPT_ONLY: list[tuple[str, Callable[[Workspace], str]]] = [
    ("alpaca without columns", lambda w: w.write("a", [{"instruction": "What is 1+2?", "answer": 3}])),
    (
        "alpaca with columns",
        lambda w: w.write("a", [{"question": "What is 1+2?", "answer": 3}], columns={"prompt": "question"}),
    ),
    ("sharegpt", lambda w: w.chat("s", [{"messages": [turn("user", "What is 1+2?")], "answer": 3}])),
    ("openai", lambda w: w.chat("o", [{"messages": [turn("user", "What is 1+2?")], "answer": 3}], "openai")),
]


@pytest.mark.parametrize("write", [case[1] for case in PROMPT_ONLY], ids=[case[0] for case in PROMPT_ONLY])
def test_rows_of_a_prompt_alone(workspace: Workspace, write: Callable[[Workspace], str]):
    dataset = write(workspace)
    (prompt,) = workspace.load(dataset).train
    assert (prompt.text, prompt.reference, prompt.columns["answer"]) == ("What is 1+2?", None, 3)
    assert workspace.tokenizer.decode(prompt.token_ids).endswith("Human: What is 1+2?</s>\nAssistant:")
    assert "messages" not in prompt.columns or prompt.columns["messages"] == [turn("user", "What is 1+2?")]
    (prompt,) = workspace.load(dataset, reference_column="answer").train
    assert prompt.reference == "3"


@pytest.mark.parametrize("formatting", ["sharegpt", "openai"])
def test_a_conversation_that_ends_in_a_tools_answer_is_a_prompt(workspace: Workspace, formatting: str):
    call = json.dumps({"name": "add", "arguments": {"a": 1}})
    messages = [turn("user", "Add."), turn("function", call), turn("tool", "3")]
    dataset = workspace.chat("tool", [{"messages": messages}], formatting)
    (prompt,) = workspace.load(dataset, "qwen3").train
    assert prompt.messages[-1] == {"role": "observation", "content": "3"}
    answered = workspace.chat("answered", [{"messages": [*messages, turn("assistant", "")]}], formatting)
    assert [prompt.token_ids] == workspace.host_ids(answered, "qwen3", enable_thinking=True)


def test_datasets_of_different_columns_and_formats_are_mixed(workspace: Workspace):
    alpaca = workspace.write("alpaca", [{"instruction": "One?", "output": "1", "level": 3}])
    bare = workspace.write("bare", [{"question": "Two?", "meta": {"source": "x"}}], columns={"prompt": "question"})
    chat = workspace.chat("chat", [{"messages": [turn("user", "Three?"), turn("assistant", "3")], "level": "high"}])
    prompts = workspace.load(f"{alpaca},{bare},{chat}").train
    assert [(p.text, p.reference) for p in prompts] == [("One?", "1"), ("Two?", None), ("Three?", "3")]
    assert [p.columns.get("level") for p in prompts] == [3, None, "high"]
    assert prompts[1].columns == {"question": "Two?", "meta": {"source": "x"}}


def test_what_the_first_thousand_rows_lack_the_next_may_have(workspace: Workspace):
    """Arrow takes the types of a file from its first thousand rows."""
    bare = {"messages": [turn("user", "Q?")], "tools": None, "gold": None, "level": None}
    broken = bare | {"messages": [turn("assistant", "1")]}
    full = {"messages": conversations("42")[2]["messages"], "tools": TOOLS, "gold": 42, "level": {"of": "doubt"}}
    dataset = workspace.chat("late", [broken] * 1001 + [bare] * 1001 + [full], tools="tools")
    prompts = workspace.load(dataset, reference_column="gold").train
    assert [p.reference for p in prompts] == [None] * 1001 + ["42"]
    assert prompts[-1].messages[0] == turn("system", "Be brief.")
    assert prompts[-1].columns == full


def numbered(count: int, offset: int = 0) -> list[dict[str, Any]]:
    return [{"instruction": f"Number {i + offset}?", "input": "", "output": str(i + offset)} for i in range(count)]


def test_max_samples_and_worker_processes(workspace: Workspace):
    dataset = workspace.write("many", numbered(30))
    prompts = workspace.load(dataset, max_samples=11, preprocessing_num_workers=2).train
    assert [(p.index, p.reference) for p in prompts] == [(i, str(i)) for i in range(11)]
    assert prompts == workspace.load(dataset, max_samples=11).train


def test_an_error_in_a_worker_process_is_the_same_error(workspace: Workspace):
    dataset = workspace.write("blank", [*numbered(8), {"instruction": " ", "output": "x"}])
    with pytest.raises(ValueError, match="prompt of this row is empty"):
        workspace.load(dataset, preprocessing_num_workers=2)


def test_val_size_splits_as_the_host_does(workspace: Workspace):
    dataset = workspace.write("many", numbered(20))
    data = workspace.load(dataset, val_size=4)
    assert (len(data.train), len(data.evaluation)) == (16, 4)
    assert [(p.index, p.dataset) for p in data.evaluation] == [(i, None) for i in range(4)]
    assert {p.reference for p in data.train} | {p.reference for p in data.evaluation} == {str(i) for i in range(20)}
    host = loader.get_dataset(**workspace.arguments(dataset, val_size=4), stage="ppo")
    assert [p.token_ids for p in data.evaluation] == [tuple(ids) for ids in host["eval_dataset"]["input_ids"]]


@pytest.mark.parametrize("apart", [False, True])
def test_evaluation_datasets(workspace: Workspace, apart: bool):
    train, one, two = (workspace.write(f"d{i}", numbered(i + 1, 10 * i)) for i in range(3))
    data = workspace.load(train, eval_dataset=f"{one},{two}", eval_on_each_dataset=apart)
    assert [p.reference for p in data.train] == ["0"]
    assert [(p.index, p.reference) for p in data.evaluation] == list(enumerate(["10", "11", "20", "21", "22"]))
    assert [p.dataset for p in data.evaluation] == [one] * 2 + [two] * 3, "whether asked for apart or not"
    assert [p.dataset for p in data.train] == [None]


def test_an_evaluation_dataset_of_which_no_prompt_is_left_is_named(workspace: Workspace):
    train, whole = workspace.write("train", numbered(2)), workspace.write("whole", numbered(2, 10))
    overlong = workspace.write("overlong", [{"instruction": "long " * 60, "output": "x"}])
    with pytest.raises(ValueError, match=r"No evaluation \(overlong\) prompt is left.*cutoff_len"):
        workspace.load(train, eval_dataset=f"{whole},{overlong}", cutoff_len=40)


def test_no_evaluation_by_default(workspace: Workspace):
    assert workspace.load(workspace.write("many", numbered(3))).evaluation == []


def test_the_whole_reference_is_kept(workspace: Workspace):
    answer = "long " * 500 + "#### 72"
    dataset = workspace.write("long", [{"instruction": "Q?", "output": answer, "proof": answer + "!"}])
    (prompt,) = workspace.load(dataset, cutoff_len=64).train
    assert prompt.reference == answer
    (prompt,) = workspace.load(dataset, cutoff_len=64, reference_column="proof").train
    assert prompt.reference == answer + "!"


@pytest.mark.parametrize(
    ("value", "reference"),
    [
        ("72", "72"),
        (72, "72"),
        (0, "0"),
        (7.5, "7.5"),
        (False, "False"),
        (None, None),
        ("", None),
    ],
)
def test_references_become_text(workspace: Workspace, value: Any, reference: str | None):
    dataset = workspace.write("alpaca", [{"instruction": "Q?", "output": value, "gold": value, "other": 1}])
    (prompt,) = workspace.load(dataset).train
    assert prompt.reference == reference
    (prompt,) = workspace.load(dataset, reference_column="gold").train
    assert prompt.reference == reference
    assert prompt.columns["gold"] == value


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (["a", "é"], ["a list of 2", '["a", "é"]', "gold.0`"]),
        (["a"], ["a list of 1", "gold.0`"]),
        ([], ["a list of 0"]),
        (
            {"style": "rule", "truth": {"of": 1}},
            ["a mapping with the fields `style`", "gold.style` or `reference_column: gold.truth.of`"],
        ),
        ([{"text": ["a"]}], ["a list of 1", "gold.0.text.0`"]),
    ],
)
def test_a_reference_of_several_values_is_refused(workspace: Workspace, value: Any, named: list[str]):
    dataset = workspace.write("several", [{"instruction": "Q?", "output": value, "gold": value, "short": "1"}])
    with pytest.raises(ValueError, match="and a reference is text") as answer:
        workspace.load(dataset)
    with pytest.raises(ValueError, match="`reference_column: gold` holds") as column:
        workspace.load(dataset, reference_column="gold")
    for part in named:
        assert part.replace("gold", "answer") in str(answer.value)
        assert part in str(column.value)
    (prompt,) = workspace.load(dataset, reference_column="short").train
    assert prompt.reference == "1", "an answer that is not asked for is in nobody's way"
    assert prompt.columns["gold"] == value


def test_fields_of_verls_parquet_files(workspace: Workspace):
    """The rows that verl's examples write."""
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [turn("user", f"What is {i}+1?")],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(i + 1)},
            "extra_info": {"index": i, "answers": [f"{i + 1}", f"{i + 1}.0"]},
            "reward_model.style": "a column of that name",
        }
        for i in range(2)
    ]
    Dataset.from_list(rows).to_parquet(workspace.folder / "verl.parquet")
    columns = {"messages": "prompt"}
    dataset = workspace.register("verl", "verl.parquet", formatting="openai", tags=CHAT_TAGS, columns=columns)
    fields = {"index": "extra_info.index", "second": "extra_info.answers.1", "third": "extra_info.answers.2"}
    fields |= {"ability": "reward_model", "truth": "reward_model.ground_truth"}
    prompts = workspace.load(dataset, reference_column="reward_model.ground_truth", reward_columns=fields).train
    assert [p.reference for p in prompts] == ["1", "2"]
    assert [p.columns["index"] for p in prompts] == [0, 1]
    assert [p.columns["second"] for p in prompts] == ["1.0", "2.0"]
    assert [p.columns["third"] for p in prompts] == [None, None]
    assert [p.columns["ability"] for p in prompts] == [row["reward_model"] for row in rows], "what is named wins"
    assert [p.columns["truth"] for p in prompts] == ["1", "2"]
    assert prompts[0].columns["extra_info"] == rows[0]["extra_info"]
    prompts = workspace.load(dataset, reference_column="reward_model.style").train
    assert {p.reference for p in prompts} == {"a column of that name"}

    for path, message in (
        ("reward_model", "holds a mapping .*: reward_model.style` or `reference_column: reward_model.ground_truth`"),
        ("reward_model.truth", "no column of the dataset: `reward_model` has `style`, `ground_truth`, and no `truth`"),
        ("ability.kind", '`ability` holds str, which has no field `kind`: "math"'),
        ("reward_models.ground_truth", "it has `data_source`, .* and no `reward_models`"),
    ):
        with pytest.raises(ValueError, match=message):
            workspace.load(dataset, reference_column=path)
    with pytest.raises(ValueError, match=r"`truth: reward_model.truth`, which is not there: `reward_model` has"):
        workspace.load(dataset, reward_columns={"truth": "reward_model.truth"})


def test_a_reward_column_of_some_datasets(workspace: Workspace):
    has = workspace.write("a", [{"instruction": "Q?", "meta": {"level": 3}}, {"instruction": "R?", "meta": None}])
    lacks = workspace.write("b", numbered(1))
    columns = {"level": "meta.level"}
    data = workspace.load(f"{has},{lacks}", reward_columns=columns)
    assert [p.columns.get("level", "none") for p in data.train] == [3, None, "none"]
    with pytest.raises(
        ValueError, match="no dataset of the run has the column `meta`: the first row has `instruction`"
    ):
        workspace.load(lacks, reward_columns=columns)


def test_a_missing_reference_column_names_those_there_are(workspace: Workspace):
    has, lacks = workspace.write("a", [{"instruction": "Q?", "gold": "1"}]), workspace.write("b", numbered(1))
    with pytest.raises(ValueError, match=r"`reference_column: gold` is no column.*`instruction`, `input`, `output`"):
        workspace.load(f"{has},{lacks}", reference_column="gold")


def test_a_cached_dataset_does_not_answer_for_other_settings(workspace: Workspace):
    dataset = workspace.write("cached", [{"instruction": "Q?", "output": "1", "gold": "2"}])
    loads = [workspace.load(dataset, reference_column=column) for column in (None, "gold", None)]
    assert [data.train[0].reference for data in loads] == ["1", "2", "1"]
    thinking, plain = (workspace.load(dataset, "qwen3", enable_thinking=on).train[0] for on in (True, False))
    assert thinking.token_ids != plain.token_ids
    assert workspace.load(dataset, cutoff_len=5, overlong_prompts="truncate").train[0].token_ids != thinking.token_ids


def test_overlong_prompts_are_dropped_and_counted(workspace: Workspace, warnings: list[str]):
    rows = [*numbered(2), {"instruction": "long " * 60, "output": "x"}, *numbered(1, 5)]
    dataset = workspace.write("mixed", rows)
    prompts = workspace.load(dataset, cutoff_len=40).train
    assert [(p.index, p.reference) for p in prompts] == [(0, "0"), (1, "1"), (2, "5")]
    (said,) = warnings
    for part in ("Dropped 1 of 4 training prompts", "`cutoff_len` (40 tokens)", "`overlong_prompts: truncate`"):
        assert part in said


def test_a_prompt_of_exactly_cutoff_len_tokens_is_kept(workspace: Workspace):
    dataset = workspace.write("one", numbered(1))
    length = len(workspace.load(dataset).train[0].token_ids)
    assert len(workspace.load(dataset, cutoff_len=length).train) == 1
    with pytest.raises(ValueError, match="No training prompt is left"):
        workspace.load(dataset, cutoff_len=length - 1)


def test_overlong_prompts_keep_their_end_when_asked(workspace: Workspace, warnings: list[str]):
    dataset = workspace.write("long", [{"instruction": "long " * 60 + "Which?", "output": "x"}])
    (whole,) = workspace.load(dataset).train
    assert not warnings
    (cut,) = workspace.load(dataset, cutoff_len=30, overlong_prompts="truncate").train
    assert len(whole.token_ids) > 30
    assert cut.token_ids == whole.token_ids[-30:]
    assert "Cut the beginning of 1 of 1 training prompts" in warnings[0]


def test_no_evaluation_prompt_left_is_refused(workspace: Workspace):
    train = workspace.write("train", numbered(2))
    held_out = workspace.write("eval", [{"instruction": "long " * 60, "output": "x"}])
    with pytest.raises(ValueError, match=r"No evaluation \(eval\) prompt is left.*cutoff_len"):
        workspace.load(train, eval_dataset=held_out, cutoff_len=40)


def test_turns_that_do_not_alternate_are_dropped_and_counted(workspace: Workspace, warnings: list[str]):
    good, answer = turn("user", "Q?"), turn("assistant", "1")
    rows = [{"messages": [answer, good]}, {"messages": [good, answer]}, {"messages": [good, good, answer, answer]}]
    (prompt,) = workspace.load(workspace.chat("broken", rows)).train
    assert (prompt.index, prompt.text) == (0, "Q?")
    assert "Dropped 2 of 3 training rows" in warnings[0]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [turn("user", ""), turn("assistant", "1")]},
        {"messages": [turn("user", " \n")]},
        {"messages": [turn("user", "Hi"), turn("assistant", "1"), turn("user", "")]},
    ],
)
def test_an_empty_prompt_is_refused_by_its_row(workspace: Workspace, row: dict[str, Any]):
    fine = {"messages": [turn("user", "Q?")], "id": "fine"}
    dataset = workspace.chat("blank", [fine, row | {"id": "the blank one"}])
    with pytest.raises(ValueError, match=r"prompt of this row is empty.*the blank one"):
        workspace.load(dataset)


def test_an_alpaca_row_without_a_prompt_column_is_refused(workspace: Workspace):
    dataset = workspace.write("alpaca", [{"output": "1", "id": "r1"}], columns={"response": "output"})
    with pytest.raises(ValueError, match=r"prompt of this row is empty.*r1.*dataset_info.json"):
        workspace.load(dataset)


@pytest.mark.parametrize("formatting", ["sharegpt", "openai"])
def test_rows_without_messages_are_refused(workspace: Workspace, formatting: str):
    dataset = workspace.chat("none", [{"messages": [turn("user", "Q?")]}, {"messages": []}], formatting)
    with pytest.raises(ValueError, match="no messages"):
        workspace.load(dataset)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({}, r"no column `instruction` \(its prompt\): it has `question`, `answer`"),
        ({"columns": {"prompt": "question", "response": "solution"}}, r"no column `solution` \(its response\)"),
        ({"columns": {"prompt": "question", "system": "about"}}, "no column `about`"),
        ({"formatting": "sharegpt"}, "no column `conversations`"),
    ],
)
def test_a_column_that_is_not_there_is_named(workspace: Workspace, info: dict[str, Any], message: str):
    dataset = workspace.write("qa", [{"question": "Q?", "answer": "1"}], **info)
    with pytest.raises(ValueError, match=message):
        workspace.load(dataset)


def test_messages_under_other_tags_are_refused(workspace: Workspace):
    dataset = workspace.write("chat", [{"conversations": [turn("user", "Q?")]}], formatting="sharegpt")
    with pytest.raises(ValueError, match=r"no key `from` but `role`, `content`.*`tags`"):
        workspace.load(dataset)


def test_a_conversation_in_an_alpaca_column_is_refused(workspace: Workspace):
    dataset = workspace.write("trl", [{"prompt": [turn("user", "Q?")], "answer": "1"}], columns={"prompt": "prompt"})
    with pytest.raises(ValueError, match=r"Column `prompt` of dataset trl.json must hold text.*sharegpt"):
        workspace.load(dataset)


def test_content_that_is_not_text_is_refused(workspace: Workspace):
    parts = [{"type": "text", "text": "Q?"}]
    dataset = workspace.chat("parts", [{"messages": [turn("user", parts)]}], "openai")
    with pytest.raises(ValueError, match="content must be text"):
        workspace.load(dataset)


@pytest.mark.parametrize(
    ("media", "words"),
    [
        ("images", "`template: default` knows none"),  # tests/host/test_images.py has those that know some
        ("videos", "videos are not supported"),
        ("audios", "audios are not supported"),
    ],
)
@pytest.mark.parametrize("formatting", ["alpaca", "sharegpt"])
def test_media_that_cannot_be_read_are_refused(workspace: Workspace, media: str, words: str, formatting: str):
    row = {"instruction": "<image>What?", "messages": [turn("user", "<image>What?")], "media": ["cat.png"]}
    if formatting == "alpaca":
        dataset = workspace.write("media", [row], columns={"prompt": "instruction", media: "media"})
    else:
        dataset = workspace.chat("media", [row], **{media: "media"})
    with pytest.raises(ValueError, match=words):
        workspace.load(dataset)


def test_an_empty_media_column_is_no_reason_to_refuse(workspace: Workspace):
    dataset = workspace.write("media", [{"q": "What?", "pics": []}], columns={"prompt": "q", "images": "pics"})
    assert workspace.load(dataset).train[0].text == "What?"


def test_columns_that_json_cannot_hold(workspace: Workspace):
    """A parquet file with a picture, bytes and a date beside the text."""
    rows = {"instruction": ["Q?"], "picture": [PILImage.new("RGB", (1, 1))], "raw": [b"\0"], "day": [date(2026, 1, 2)]}
    features = Features(instruction=Value("string"), picture=Image(), raw=Value("binary"), day=Value("date32"))
    Dataset.from_dict(rows, features=features).to_parquet(workspace.folder / "rows.parquet")
    (prompt,) = workspace.load(workspace.register("rows", "rows.parquet")).train
    assert prompt.columns == {"instruction": "Q?", "picture": None, "raw": None, "day": "2026-01-02"}


def test_rated_rows_give_a_reference_where_the_answer_is_good(workspace: Workspace):
    rows = [{"instruction": "Q?", "output": "1", "good": good} for good in (True, False)]
    columns = {"prompt": "instruction", "response": "output", "kto_tag": "good"}
    prompts = workspace.load(workspace.write("kto", rows, columns=columns)).train
    assert [p.reference for p in prompts] == ["1", None]


def test_the_hosts_own_errors_stay(workspace: Workspace):
    workspace.write("known", numbered(1))
    with pytest.raises(ValueError, match="Undefined dataset unknown"):
        workspace.load("unknown")
    ranking = workspace.write("ranking", numbered(1), ranking=True)
    with pytest.raises(ValueError, match="not applicable"):
        workspace.load(ranking)


def test_no_dataset_and_no_rows_are_refused(workspace: Workspace):
    with pytest.raises(ValueError, match="`dataset`"):
        workspace.load(None)
    with pytest.raises(ValueError, match=r"no rows.*max_samples"):
        workspace.load(workspace.write("some", numbered(2)), max_samples=0)


def test_the_first_example_is_printed_in_our_form(workspace: Workspace, capsys: pytest.CaptureFixture[str]):
    workspace.load(workspace.write("shown", [{"instruction": "What is 1+2?", "output": "3"}]))
    printed = capsys.readouterr().out
    assert "training example:\nprompt_ids:\n[" in printed
    assert "prompt:\nHuman: What is 1+2?</s>\nAssistant:\nreference:\n3\n" in printed


def test_the_host_is_put_back(workspace: Workspace):
    before = converter.get_dataset_converter, loader._get_dataset_processor
    dataset = workspace.write("fine", numbered(2))
    workspace.load(dataset)
    assert (converter.get_dataset_converter, loader._get_dataset_processor) == before
    with pytest.raises(ValueError, match="no column"):
        workspace.load(workspace.write("broken", [{"a": 1}]))
    assert (converter.get_dataset_converter, loader._get_dataset_processor) == before
    assert len(workspace.host_ids(dataset)) == 2


def test_the_callables_can_be_pickled(workspace: Workspace):
    arguments = workspace.arguments(workspace.write("fine", numbered(1)))
    with prompt_datasets._prompt_pipeline("gold", {}):
        processor = loader._get_dataset_processor(
            arguments["data_args"], "ppo", arguments["template"], workspace.tokenizer, None
        )
    assert pickle.loads(pickle.dumps(processor)).reference_column == "gold"
