"""From the form to the run: what the form shows is what the run gets."""

import dataclasses
import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from grpo_stage.algorithm.combinations import WITH_TOOLS
from grpo_stage.algorithm.conditions import Above
from grpo_stage.arguments import GRPOArguments
from grpo_stage.board.fields import FORM_FIELDS, HOST_FIELDS, FormField
from grpo_stage.host.parser import check, effective_defaults, typed

from .conftest import Board


OTHER_STAGES = ("Supervised Fine-Tuning", "Reward Modeling", "PPO", "DPO", "KTO", "Pre-Training")
TEXTS = (
    "two words",
    "a,b",
    'say "hi"',
    "it's",
    "$HOME `id` \\n",
    "line\nbreak",
    "ünïcode 数",
    "--flag",
    "# no comment",
)


def values_of(field: FormField) -> list[Any]:
    """Every kind of value that a person can give a field, as the widget holds it."""
    if field.kind == "choice":
        return list(field.choices)
    if field.kind == "flag":
        return [False, True]
    if field.kind in ("whole", "number"):
        low = 1 if field.minimum is None else field.minimum
        high = low + 3 if field.maximum is None else field.maximum
        middle = [] if field.kind == "whole" else [low + 0.25]
        return [None, low, high, *middle]
    if field.kind == "list":
        return [[], list(field.choices[:1]), ["some file's.py:a", "b b.py:c"], ["a,b.py:c"], ["a,b.py:c", "d"]]
    if field.kind == "mapping":
        return ["", '{"accuracy": {"pattern": "a, b\'c \\"d\\""}}', '{"regex": {"x": false, "y": null}}']
    return ["", *TEXTS]


def companions(field: FormField) -> dict[str, Any]:
    """Values of other fields under which this one has an effect."""
    values: dict[str, Any] = {"train__grpo_environment": "file.py:Class"} if field.key in WITH_TOOLS else {}
    for key, allowed in field.only_with.items():
        if key == "eval_strategy":
            values["train__val_size"] = 0.5
        else:
            other = next(one for one in FORM_FIELDS if one.key == key)
            values |= companions(other)
            if isinstance(allowed, tuple):
                value = other.default if other.default in allowed else allowed[0]
            else:
                value = allowed.bound + 0.04 if isinstance(allowed, Above) else getattr(allowed, "word", "something")
            values[f"train__grpo_{key}"] = [value] if other.kind == "list" else value
    return values


CASES = [
    pytest.param(field, value, id=f"{field.key}-{value!r}") for field in FORM_FIELDS for value in values_of(field)
]


def test_every_key_of_the_stage_has_a_field() -> None:
    keys = [field.key for field in FORM_FIELDS]
    assert set(keys) == {spec.name for spec in dataclasses.fields(GRPOArguments)} | {f.key for f in HOST_FIELDS}
    assert len(keys) == len(set(keys))


def test_host_fields_have_the_defaults_of_the_run() -> None:
    derived = {"vllm_maxlen", "vllm_gpu_util", "max_steps"}
    defaults = effective_defaults()
    assert {f.key: f.default for f in HOST_FIELDS if f.key not in derived} == {
        f.key: defaults[f.key] for f in HOST_FIELDS if f.key not in derived
    }


@pytest.mark.parametrize(("field", "value"), CASES)
def test_a_value_reaches_the_run(
    field: FormField, value: Any, board: Board, yaml_of: Callable[..., dict[str, Any]]
) -> None:
    form = {**companions(field), f"train__grpo_{field.key}": value}
    run = typed(yaml_of(**form))
    expected = {
        "choice": lambda: value,
        "flag": lambda: value,
        "whole": lambda: value,
        "number": lambda: value,
        "list": lambda: value if "a,b.py:c" in value else ",".join(value) or None,
        "mapping": lambda: json.loads(value) if value else None,
        "text": lambda: value or None,
    }[field.kind]()
    if field.key == "eval_steps" and value is None:
        expected = run["save_steps"]
    default = field.default if expected is None else expected
    assert run.get(field.key, field.default) == default


@pytest.mark.parametrize(("field", "value"), CASES)
def test_the_previewed_command_runs_the_same(
    field: FormField, value: Any, board: Board, yaml_of: Callable[..., dict[str, Any]]
) -> None:
    form = {**companions(field), f"train__grpo_{field.key}": value}
    assert read_run(command_words(preview(board, **form))) == read_run(yaml_of(**form))


def preview(board: Board, **values: Any) -> str:
    from llamafactory.webui.runner import gen_cmd

    return gen_cmd(board.arguments(**values))


def command_words(markdown: str) -> list[str]:
    """The arguments that bash hands `llamafactory-cli`, less the first, which is `train`."""
    lines = markdown.splitlines()
    assert (lines[0].strip("`"), lines[-1].strip("`")) == ("bash", "")
    script = "\n".join(["llamafactory-cli() { printf '%s\\0' \"$@\"; }", *lines[1:-1]])
    done = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True)
    assert done.stderr == ""
    words = done.stdout.split("\0")[:-1]
    assert words[0] == "train"
    return words[1:]


def read_run(raw: Any) -> dict[str, Any]:
    """Typed arguments; a mapping may come as JSON."""
    return {
        key: json.loads(value) if isinstance(value, str) and value.startswith("{") else value
        for key, value in typed(raw).items()
    }


def test_texts_reach_the_command_as_they_are(board: Board) -> None:
    extra = {"default_system": "\n".join(TEXTS), "lr_scheduler_kwargs": {"a b": "c'd", "e": ["f", "g"]}}
    run = read_run(command_words(preview(board, train__extra_args=json.dumps(extra), train__output_dir="a b/c,d 'e'")))
    assert run["default_system"] == extra["default_system"]
    assert run["lr_scheduler_kwargs"] == extra["lr_scheduler_kwargs"]
    assert run["output_dir"] == "a b/c,d 'e'"


def test_code_in_a_value_does_not_end_the_preview(board: Board) -> None:
    markdown = preview(board, train__extra_args=json.dumps({"default_system": "```\n<script>x</script>\n```"}))
    assert markdown.startswith("````bash\n")
    assert typed(command_words(markdown))["default_system"] == "```\n<script>x</script>\n```"


@pytest.mark.parametrize(
    "extra",
    [
        {"dataloader_pin_memory": False},
        {"shuffle_buffer": None},
        {"default_system": ""},
        {"save_safetensors": False},
        {"preprocessing_num_workers": None},
        {"warmup_steps": 0},
        {"split_batches": False},
    ],
    ids=str,
)
def test_extra_arguments_come_as_they_are(
    extra: dict[str, Any], board: Board, yaml_of: Callable[..., dict[str, Any]]
) -> None:
    kept = {key: value for key, value in extra.items() if value is not None}
    run = yaml_of(train__extra_args=json.dumps(extra))
    assert {key: run[key] for key in kept} == kept
    assert [key for key, value in extra.items() if value is None and key in run] == []


@pytest.mark.parametrize("method", ["lora", "full", "freeze"])
def test_the_form_as_it_starts_is_accepted(method: str, board: Board) -> None:
    assert check(board.arguments(top__finetuning_type=method))["stage"] == "grpo"


@pytest.mark.parametrize("compute_type", ["bf16", "fp16", "fp32", "pure_bf16"])
def test_compute_type(compute_type: str, yaml_of: Callable[..., dict[str, Any]]) -> None:
    run = yaml_of(train__compute_type=compute_type)
    assert [key for key in ("bf16", "fp16", "pure_bf16") if run.get(key)] == [compute_type][: compute_type != "fp32"]


def test_hidden_fields_are_not_sent(board: Board) -> None:
    run = board.arguments(train__grpo_rollout_backend="hf", train__grpo_vllm_sleep=1, train__grpo_eval_temperature=0.5)
    assert {"vllm_sleep", "eval_temperature"} & run.keys() == set()
    turns = {"train__grpo_max_turns": 3, "train__grpo_tool_timeout": 5}
    assert WITH_TOOLS.keys() & board.arguments(**turns).keys() == set()
    for given in ({"train__grpo_tools": ["file.py:function"]}, {"train__grpo_environment": "file.py:Class"}):
        assert board.arguments(**turns, **given)["max_turns"] == 3


@pytest.mark.parametrize("kind", ["lora", "full", "api"])
def test_only_a_reward_model_of_its_own_has_adapters_and_bits(kind: str, board: Board) -> None:
    keys = {"reward_model_adapters": "rm", "reward_model_quantization_bit": 4}
    form = {"reward_model": "http://here/score" if kind == "api" else "base", "reward_model_type": kind, **keys}
    run = board.arguments(**{f"train__grpo_{key}": value for key, value in form.items()})
    assert {key: run[key] for key in keys if key in run} == (keys if kind == "full" else {})


def test_evaluation_follows_from_its_prompts(board: Board) -> None:
    assert "eval_strategy" not in board.arguments()
    held_out = board.arguments(train__val_size=0.1, train__grpo_eval_num_generations=4)
    assert (held_out["eval_strategy"], held_out["eval_steps"], held_out["eval_num_generations"]) == ("steps", 100, 4)
    assert "per_device_eval_batch_size" not in held_out
    named = board.arguments(train__grpo_eval_dataset=["addition"], train__grpo_eval_steps=7)
    assert (named["eval_dataset"], named["eval_strategy"], named["eval_steps"]) == ("addition", "steps", 7)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train__grpo_reward_funcs": []}, ["`reward_funcs` is missing"]),
        ({"train__grpo_reward_kwargs": "{"}, ["reward_kwargs", "JSON"]),
        ({"train__grpo_reward_kwargs": "[1]"}, ["reward_kwargs", "mapping"]),
        ({"train__grpo_epsilon": 1}, ["epsilon: 1", "below 1"]),
        ({"train__extra_args": '{"num_generatons": 4}'}, ["num_generatons", "num_generations"]),
        ({"train__extra_args": "[]"}, ["extra arguments", "mapping"]),
        ({"train__extra_args": '{"stage": "sft"}'}, ["stage: sft"]),
        (
            {"train__extra_args": '{"num_generations": 4}', "train__grpo_num_generations": 16},
            ["`num_generations`", "16", "4", "extra arguments"],
        ),
        ({"train__ds_stage": "3"}, ["ds_z3_config.json", "names no file"]),
        ({"train__lora_dropout": 0.1}, ["lora_dropout: 0.1", "dropout is off"]),
        ({"train__dataset": ["nothing"]}, ["dataset: nothing"]),
        ({"train__learning_rate": "abc"}, ["learning_rate: abc", "a number"]),
        ({"train__num_train_epochs": ""}, ["num_train_epochs", "a number"]),
        ({"train__max_grad_norm": "1,0"}, ["max_grad_norm: 1,0", "a number"]),
        ({"train__max_samples": "1.5"}, ["max_samples: 1.5", "a whole number"]),
        ({"top__quantization_bit": "four"}, ["quantization_bit: four", "a whole number"]),
        (
            {"top__model_name": "Qwen2-VL-2B-Instruct", "train__image_max_pixels": "large"},
            ["image_max_pixels: large", "768*768"],
        ),
        ({"train__extra_args": '{"x<img src=x>![y](z)": 1}'}, ["x&lt;img src=x>!&#91;y](z)"]),
        ({"train__extra_args": '{"seed": 1, "seed": 2}'}, ["`seed` stands 2 times", "extra arguments"]),
        ({"train__grpo_num_generations": -5}, ["num_generations: -5"]),
        ({"train__grpo_num_generations": 2.7}, ["num_generations: 2.7", "a whole number"]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_the_run_would_refuse_is_refused_here(values: dict[str, Any], said: list[str], board: Board) -> None:
    error = board.runner._initialize(board.data(**values), do_train=True, from_preview=True)
    assert [part for part in said if part not in error] == []


@pytest.mark.parametrize("stage", OTHER_STAGES)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_nothing_of_other_stages_changes(stage: str, method: str, board: Board) -> None:
    from llamafactory.webui.runner import Runner, gen_cmd

    own = Runner(board.manager)
    data = board.data(
        train__training_stage=stage,
        top__finetuning_type=method,
        train__reward_model=["rm"] if method == "lora" else "rm",
        train__val_size=0.1,
        train__extra_args='{"optim": "adamw_torch", "do_sample": false}',
    )
    assert board.runner._parse_train_args(data) == own._parse_train_args(data)
    assert gen_cmd(own._parse_train_args(data)) == gen_cmd.__wrapped__(own._parse_train_args(data))  # type: ignore[attr-defined]
    saved = board.runner._build_config_dict(data)
    assert saved == {key: value for key, value in own._build_config_dict(data).items() if "grpo_" not in key}


def test_the_stage_stands_behind_ppo() -> None:
    from llamafactory.extras.constants import TRAINING_STAGES

    names = list(TRAINING_STAGES)
    assert names[names.index("PPO") + 1] == "GRPO"
    assert [name for name in names if name != "GRPO"] == list(OTHER_STAGES)


def test_the_panel_stands_behind_the_rlhf_panel(board: Board) -> None:
    panel, rlhf = (board.manager.get_elem_by_id(f"train.{name}") for name in ("grpo_tab", "rlhf_tab"))
    siblings = panel.parent.children
    assert siblings[siblings.index(rlhf) + 1] is panel
    stage, questions = (board.manager.get_elem_by_id(f"train.{name}") for name in ("training_stage", "grpo_wizard"))
    while stage.parent is not panel.parent:
        stage = stage.parent
    assert siblings[siblings.index(stage) + 1] is questions


def test_a_game_needs_no_dataset(board: Board, yaml_of: Callable[..., dict[str, Any]]) -> None:
    form = {"train__grpo_environment": "textarena:GuessTheNumber-v0", "train__grpo_reward_funcs": ["environment"]}
    for dataset in ([], None):
        data = board.data(train__dataset=dataset, **form)
        assert board.runner._initialize(data, do_train=True, from_preview=True) == ""
        assert board.runner.checked_form(data)[0] == []
        assert "dataset" in board.runner.trial_arguments(data)
        assert yaml_of(train__dataset=dataset, **form)["dataset"] == "textarena:GuessTheNumber-v0"
    assert yaml_of(**form)["dataset"] == "addition"  # which the user has chosen
    own = board.data(train__dataset=[], train__grpo_environment="file.py:Class")
    assert "dataset" in board.runner._initialize(own, do_train=True, from_preview=True)
