"""The one parse of a GRPO run: keys, types, what the stage sets, and what other stages are spared."""

import ast
import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from llamafactory.hparams.finetuning_args import FinetuningArguments
from llamafactory.hparams.parser import get_train_args
from omegaconf import OmegaConf
from transformers import HfArgumentParser

from grpo_stage.arguments import GRPOArguments, grpo_field_names
from grpo_stage.host.configuration_file import read_command_line, stage_of
from grpo_stage.host.keys import TRL_KEYS
from grpo_stage.host.parser import ARGUMENT_CLASSES, GRPOFinetuningArguments, parse, refuse_grpo_keys, typed


def flags(recipe: dict[str, Any]) -> list[str]:
    """The recipe as a command line."""
    argv: list[str] = []
    for key, value in recipe.items():
        argv += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return argv


def refusal(raw: Any) -> str:
    with pytest.raises(ValueError, match="`") as error:
        parse(raw)
    return str(error.value)


# Names


def test_no_name_collides_with_the_host():
    hosts = [cls for cls in ARGUMENT_CLASSES if cls is not GRPOFinetuningArguments] + [FinetuningArguments]
    taken = {spec.name: cls.__name__ for cls in hosts for spec in dataclasses.fields(cls)}
    assert {name: taken[name] for name in grpo_field_names() if name in taken} == {}


def test_stage_is_the_hosts_and_ours():
    of_host = get_args(get_type_hints(FinetuningArguments)["stage"])
    assert get_args(get_type_hints(GRPOFinetuningArguments)["stage"]) == (*of_host, "grpo")


def test_host_parser_knows_our_keys_with_their_help():
    text = re.sub(r"\s+", "", HfArgumentParser(GRPOFinetuningArguments).format_help())  # which wraps at hyphens, too
    assert "--num_generations" in text
    for spec in dataclasses.fields(GRPOArguments):
        assert re.sub(r"\s+", "", spec.metadata["help"]) in text, spec.name
        assert "group" in spec.metadata, "the host's parser must not strip the originals"


def test_to_dict_of_another_stage_has_no_key_of_ours():
    assert grpo_field_names() & GRPOFinetuningArguments(stage="sft").to_dict().keys() == set()
    assert GRPOFinetuningArguments(stage="sft").to_dict() == FinetuningArguments(stage="sft").to_dict()
    assert grpo_field_names() <= GRPOFinetuningArguments(stage="grpo").to_dict().keys()


@pytest.mark.parametrize(
    ("raw", "stage"),
    [
        ({"stage": "grpo"}, "grpo"),
        (["--stage", "grpo"], "grpo"),
        (["--stage=grpo"], "grpo"),
        (["--stage", "dpo", "--stage=grpo"], "grpo"),
        ({"stage": "dpo"}, "dpo"),
    ],
)
def test_stage_of(raw, stage):
    assert stage_of(raw) == stage


@pytest.mark.parametrize(
    "raw",
    [
        {"stage": "dpo", "num_generations": 8, "learning_rate": 1e-5},
        ["--stage", "dpo", "--num_generations", "8"],
        ["--stage=dpo", "--num-generations=8"],
        {"stage": "dpo", "num_generations": None},
    ],
)
def test_our_keys_are_refused_in_other_stages(raw):
    with pytest.raises(ValueError, match=r"`num_generations`: only `stage: grpo` .* `stage: dpo`"):
        refuse_grpo_keys(raw)


@pytest.mark.parametrize(
    "raw", [{}, [], {"stage": "sft", "temperature": 1.0}, ["--stage", "sft", "--temperature", "1"]]
)
def test_other_stages_are_left_alone(raw):
    refuse_grpo_keys(raw)


def test_without_a_stage_the_hosts_default_is_named():
    with pytest.raises(ValueError, match="`stage: sft`"):
        refuse_grpo_keys({"beta": 0.1})


def test_another_stages_values_are_left_as_they_are():
    refuse_grpo_keys({"stage": "sft", "default_system": "Pay ${price} now", "run_name": "${oc.env:NOT_THERE"})
    refuse_grpo_keys(["--stage", "dpo", "--default_system", "Pay ${price} now"])


# Each module is the first one in a fork of a process that has imported what takes long: what the host imports.
IMPORTS = """
import importlib, os, sys
import datasets, peft, torch, transformers, trl
for module in ("parser", "recipe"):
    assert not {"llamafactory.hparams", "grpo_stage.host"} & sys.modules.keys()
    if not os.fork():
        importlib.import_module(f"grpo_stage.host.{module}")
        from llamafactory.hparams import parser
        print(module, parser._TRAIN_ARGS[3].__name__)
        sys.exit()
    assert os.wait()[1] == 0
"""


def test_any_module_may_be_imported_first():
    """The host's parser, once imported, calls for our class while our own import is still under way."""
    ended = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=False)
    expected = ["parser GRPOFinetuningArguments", "recipe GRPOFinetuningArguments"]
    assert ended.stdout.splitlines()[-2:] == expected, ended.stderr


# Both routes


def test_flags_and_yaml_give_the_same(recipe):
    recipe |= {
        "learning_rate": "2e-6",
        "reward_funcs": ["accuracy", "format"],
        "reward_weights": [1, 0.5],
        "top_k": -1,
    }
    from_yaml, from_flags = parse(recipe), parse(flags(recipe))
    assert from_yaml.given == from_flags.given == frozenset(recipe)
    for part in ("model", "data", "finetuning", "generating"):
        assert getattr(from_yaml, part) == getattr(from_flags, part), part
    assert from_yaml.training.learning_rate == from_flags.training.learning_rate == 2e-6
    assert from_yaml.finetuning.reward_weights == [1.0, 0.5]
    assert from_yaml.generating.top_k == 0


def test_a_flag_alone_is_true_and_its_complement_false(recipe):
    argv = [flag for flag in flags(recipe) if flag != "True"]
    assert parse(argv).training.do_train is True
    assert parse([*argv, "--no_use_fast_tokenizer"]).model.use_fast_tokenizer is False
    assert parse([*argv, "--log-completions"]).finetuning.log_completions is True


def test_null_is_not_given(recipe):
    arguments = parse(recipe | {"reward_model": None, "enable_thinking": None})
    assert not {"reward_model", "enable_thinking"} & arguments.given
    assert arguments.data.enable_thinking is None, "not the host's default of True"


def test_help_prints_the_hosts_text_and_ends(recipe, capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--stage", "grpo", "--help"])
    assert end.value.code == 0
    assert "--num_generations" in capsys.readouterr().out


# What the stage sets


def test_stage_defaults_are_neutral(recipe):
    arguments = parse(recipe)
    generating = arguments.generating
    assert (generating.temperature, generating.top_p, generating.top_k, generating.repetition_penalty) == (1, 1, 0, 1)
    assert arguments.training.logging_steps == 1
    assert not {"temperature", "top_p", "top_k", "logging_steps"} & arguments.given


@pytest.mark.parametrize("written", [lambda recipe: recipe, flags])
def test_what_the_user_wrote_is_kept_though_it_is_the_hosts_default(recipe, written):
    """0.95, 0.7 and 50 cannot be told from the host's defaults once parsed."""
    arguments = parse(written(recipe | {"temperature": 0.95, "top_p": 0.7, "top_k": 50, "logging_steps": 500}))
    generating = arguments.generating
    assert (generating.temperature, generating.top_p, generating.top_k) == (0.95, 0.7, 50)
    assert arguments.training.logging_steps == 500


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What the run is warned of."""
    messages: list[str] = []
    monkeypatch.setattr("grpo_stage.host.advice.logger.warning_rank0", messages.append)
    return messages


def test_skewed_sampling_is_honored_with_a_warning(recipe, said):
    parse(recipe)
    assert said == []
    parse(recipe | {"top_p": 0.9})
    assert len(said) == 1
    assert "`top_p: 0.9`" in said[0]


@pytest.mark.parametrize("options", [{"loss_type": "gspo"}, {"importance_sampling_level": "sequence"}])
def test_a_clip_range_of_tokens_for_sequences_warns(recipe, said, options):
    options |= {"num_iterations": 2}
    parse(recipe | options | {"epsilon": 3e-4})
    assert said == []
    parse(recipe | options)
    assert len(said) == 1
    assert "`epsilon: 0.2` by default" in said[0]
    assert "`epsilon: 3.0e-4`" in said[0]


def test_a_clip_that_never_acts_warns(recipe, said):
    written = {"epsilon": 0.2, "epsilon_high": 0.28}
    for uses in ({"num_iterations": 2}, {"steps_per_generation": 2}, {"dynamic_sampling": True, "max_steps": 2}):
        parse(recipe | written | uses)
    parse(recipe)
    assert said == []
    parse(recipe | written)
    assert len(said) == 1
    assert "`epsilon: 0.2`, `epsilon_high: 0.28`: without effect" in said[0]
    assert "steps_per_generation: 4" in said[0]


def test_a_schedule_for_steps_that_dynamic_sampling_may_not_reach_warns(recipe, said):
    epochs = recipe | {"max_steps": -1, "num_train_epochs": 1, "lr_scheduler_type": "cosine"}
    parse(epochs)
    parse(epochs | {"dynamic_sampling": True, "lr_scheduler_type": "constant_with_warmup"})
    parse(epochs | {"dynamic_sampling": True, "max_steps": 5})
    assert said == []
    parse(epochs | {"dynamic_sampling": True})
    assert len(said) == 1
    assert "`lr_scheduler_type: cosine` with `dynamic_sampling: true`" in said[0]


def test_half_precision_on_a_cpu_warns(recipe, said):
    parse(recipe | {"bf16": True})
    assert len(said) == 1
    assert "8 to 25 times slower" in said[0]


def test_a_completion_has_room_beside_the_prompt(recipe):
    arguments = parse(recipe)
    assert arguments.data.cutoff_len == 64
    assert arguments.model.model_max_length == 64 + 32
    assert arguments.model.vllm_maxlen == 64 + 32


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (8, 8), (9, 16), (48, 64), (257, 320), (512, 512)])
def test_vllm_rank_is_rounded_up(recipe, rank, served):
    assert parse(recipe | {"rollout_backend": "vllm", "lora_rank": rank}).model.vllm_max_lora_rank == served


def test_vllm_rank_is_the_continued_adapters(recipe, adapter):
    assert (
        parse(recipe | {"rollout_backend": "vllm", "adapter_name_or_path": str(adapter)}).model.vllm_max_lora_rank
        == 64
    )


def test_vllm_keys_of_the_user_are_kept(recipe):
    own = {"rollout_backend": "vllm", "vllm_maxlen": 400, "vllm_gpu_util": 0.7, "vllm_max_lora_rank": 32}
    model = parse(recipe | own).model
    assert (model.vllm_maxlen, model.vllm_gpu_util, model.vllm_max_lora_rank) == (400, 0.7, 32)
    assert parse(recipe | {"rollout_backend": "vllm"}).model.vllm_gpu_util == 0.3


def test_slots_are_not_counted_as_tokens(recipe):
    """LLaMA Board always asks for it."""
    arguments = parse(recipe | {"include_num_input_tokens_seen": True})
    assert arguments.training.include_num_input_tokens_seen == "no"


def test_accumulation_stays_what_the_user_wrote(recipe):
    assert parse(recipe | {"gradient_accumulation_steps": 4}).training.gradient_accumulation_steps == 4


# Keys


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("num_generation", "num_generations"), ("learning_rates", "learning_rate"), ("rewards_funcs", "reward_funcs")],
)
def test_unknown_key_names_the_nearest(recipe, wrong, right):
    for raw in (recipe | {wrong: 1}, flags(recipe | {wrong: 1})):
        message = refusal(raw)
        assert f"`{wrong}`" in message
        assert f"`{right}`" in message


def test_extra_keys_are_the_hosts_choice(recipe, monkeypatch):
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "1")
    assert "not_a_key" not in parse(recipe | {"not_a_key": 1}).given
    assert "TRL" in refusal(recipe | {"max_completion_length": 1})


def test_a_stray_word_is_refused(recipe):
    assert "`train.yaml` belongs to no key" in refusal(["train.yaml", *flags(recipe)])


def _trl_config_fields() -> set[str]:
    """TRL 0.24 does not import on every transformers: read the class body."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0], "trainer", "grpo_config.py").read_text(encoding="utf-8")
    body = next(
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "GRPOConfig"
    )
    return {
        node.target.id for node in body.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def test_every_key_that_only_trl_has_is_answered():
    ours = {spec.name for cls in ARGUMENT_CLASSES for spec in dataclasses.fields(cls)}
    fields = _trl_config_fields()
    assert len(fields) > 30
    assert fields - ours - TRL_KEYS.keys() == set()
    assert ours & TRL_KEYS.keys() == set(), "a key that is known here needs no answer"
    assert {entry.ours for entry in TRL_KEYS.values()} - {None} <= ours


@pytest.mark.parametrize(
    ("theirs", "value", "ours"),
    [
        ("max_completion_length", 256, "max_new_tokens: 256"),
        ("max_prompt_length", 512, "cutoff_len: 512"),
        ("use_vllm", True, "rollout_backend: vllm"),
        ("use_vllm", False, "rollout_backend: hf"),
        ("vllm_gpu_memory_utilization", 0.4, "vllm_gpu_util: 0.4"),
        ("vllm_max_model_length", 1024, "vllm_maxlen: 1024"),
        ("shuffle_dataset", False, "disable_shuffling: true"),
        ("vllm_importance_sampling_correction", True, "rollout_correction: token"),
        ("vllm_importance_sampling_cap", 3.0, "rollout_correction_max: 3.0"),
        ("vllm_importance_sampling_clip_min", 0.5, "rollout_correction_min: 0.5"),
        ("multi_objective_aggregation", "normalize_then_sum", "advantage_estimator: gdpo"),
        ("normalize_advantages", False, "scale_rewards: none"),
        ("router_aux_loss_coef", 0.01, "moe_aux_loss_coef: 0.01"),
        ("use_liger_loss", True, "does not have"),
        ("generation_batch_size", 64, "steps_per_generation"),
        ("vllm_mode", "server", "rollout_backend: vllm_server"),
        ("vllm_mode", "colocate", "rollout_backend: vllm"),
        ("vllm_server_base_url", "http://a:8000", "vllm_server_urls: http://a:8000"),
        ("vllm_server_host", "a", "vllm_server_urls: http://a:8000"),
        ("vllm_server_port", 8001, "vllm_server_urls: http://localhost:8001"),
        ("vllm_server_timeout", 60.0, "grpo-stage serve"),
    ],
)
def test_trls_key_is_answered_with_ours(recipe, theirs, value, ours):
    for raw in (recipe | {theirs: value}, flags(recipe | {theirs: value})):
        message = refusal(raw)
        assert f"`{theirs}`" in message or f"`{theirs}:" in message
        assert ours in message


@pytest.mark.parametrize("key", sorted(TRL_KEYS))
def test_every_answer_says_what_to_do(recipe, key):
    assert re.search(r"write `\w+: [\w{][^`]*`|Leave it out", refusal(recipe | {key: 1}))


# Types


@pytest.mark.parametrize(
    ("key", "written", "part", "read"),
    [
        ("learning_rate", "1e-6", "training", 1e-6),
        ("num_generations", "8", "finetuning", 8),
        ("num_generations", 8.0, "finetuning", 8),
        ("max_samples", "1e3", "data", 1000),
        ("log_completions", "true", "finetuning", True),
        ("log_completions", "False", "finetuning", False),
        ("plot_loss", 0, "finetuning", False),
        ("lora_target", ["q_proj", "v_proj"], "finetuning", ["q_proj", "v_proj"]),
        ("lora_target", "q_proj,v_proj", "finetuning", ["q_proj", "v_proj"]),
        ("dataset", ["sums", "gsm8k"], "data", ["sums", "gsm8k"]),
        ("run_name", 2024, "training", "2024"),
        ("eval_strategy", False, "training", "no"),  # what YAML makes of `no`
        ("save_strategy", "epoch", "training", "epoch"),
        ("lr_scheduler_kwargs", {"num_cycles": 2}, "training", {"num_cycles": 2}),
        ("lr_scheduler_kwargs", '{"num_cycles": 2}', "training", {"num_cycles": 2}),
        ("vllm_config", '{"max_num_seqs": 4}', "model", {"max_num_seqs": 4}),
        ("report_to", ["tensorboard"], "training", ["tensorboard"]),
        ("resume_from_checkpoint", None, "training", None),
        ("resume_from_checkpoint", False, "training", False),
        ("resume_from_checkpoint", "false", "training", False),
        ("flash_attn", "sdpa", "model", "sdpa"),
        ("reward_kwargs", {"accuracy": {}}, "finetuning", {"accuracy": {}}),
        ("epsilon_high", "0.28", "finetuning", 0.28),
        ("warmup_steps", 0.1, "training", 0.1),
        ("save_steps", 20, "training", 20),
    ],
)
def test_accepted_values(recipe, key, written, part, read):
    value = getattr(
        getattr(parse(recipe | {key: written, "rollout_backend": "vllm" if key.startswith("vllm_") else "hf"}), part),
        key,
    )
    assert value == read
    assert isinstance(value, bool) is isinstance(read, bool)


@pytest.mark.parametrize(
    ("key", "written", "expected"),
    [
        ("num_generations", "many", "a whole number"),
        ("num_generations", 2.5, "a whole number"),
        ("num_generations", True, "a whole number"),
        ("num_generations", [8], "a whole number"),
        ("beta", "none", "a finite number"),
        ("beta", ".inf", "a finite number"),
        ("learning_rate", float("nan"), "a finite number"),
        ("learning_rate", True, "a finite number"),
        ("bf16", "maybe", "true or false"),
        ("log_completions", 2, "true or false"),
        ("template", ["a"], "text"),
        ("template", True, "text"),
        ("lora_target", [["q_proj"]], "text"),
        ("reward_kwargs", 3, "a mapping"),
        ("cutoff_len", None, "a whole number"),
        ("label_names", 3, "a list"),
    ],
)
def test_wrong_type(recipe, key, written, expected):
    message = refusal(recipe | {key: written})
    assert f"`{key}" in message
    assert expected in message
    assert "leave the line out" in message


@pytest.mark.parametrize(
    ("key", "written", "named"),
    [
        ("loss_type", "ppo", "grpo, bnpo, dr_grpo, dapo"),
        ("loss_type", "dr-grpo", "Write `loss_type: dr_grpo`"),
        ("scale_rewards", True, "Write `scale_rewards: group`"),
        ("scale_rewards", False, "Write `scale_rewards: none`"),
        ("rollout_backend", "sglang", "vllm, vllm_server, hf"),
        ("finetuning_type", "qlora", "lora, oft, freeze, full"),
        ("lr_scheduler_type", "cosin", "Write `lr_scheduler_type: cosine`"),
        ("flash_attn", "flash", "fa2"),
        ("rope_scaling", "longer", "linear"),
    ],
)
def test_wrong_choice(recipe, key, written, named):
    for raw in (recipe | {key: written}, flags(recipe | {key: written})):
        message = refusal(raw)
        assert f"`{key}: {written}`".lower() in message.lower()
        assert named in message


HOST_RECIPES = {
    "lora": """
        trust_remote_code: true
        lora_rank: 8
        lora_target: all
        max_samples: 1000
        preprocessing_num_workers: 16
        dataloader_num_workers: 4
        logging_steps: 10
        save_steps: 500
        plot_loss: true
        overwrite_output_dir: true
        save_only_model: false
        report_to: none
        per_device_train_batch_size: 1
        gradient_accumulation_steps: 8
        learning_rate: 1.0e-4
        num_train_epochs: 3.0
        lr_scheduler_type: cosine
        warmup_ratio: 0.1
        bf16: true
        ddp_timeout: 180000000
        resume_from_checkpoint: null
    """,
    "evaluation": """
        dataset: sums,gsm8k
        val_size: 0.1
        eval_strategy: steps
        eval_steps: 500
        eval_on_start: true
    """,
    "best": """
        val_size: 10
        eval_strategy: steps
        eval_steps: 10
        save_steps: 10
        load_best_model_at_end: true
        metric_for_best_model: eval_reward
        greater_is_better: true
        early_stopping_steps: 3
    """,
    "full": "{finetuning_type: full, overwrite_cache: true, optim: adamw_torch, weight_decay: 0.1}",
    "freeze": "{finetuning_type: freeze, freeze_trainable_layers: 1, freeze_trainable_modules: all}",
    "qlora": "{quantization_bit: 4, quantization_method: bnb, double_quantization: false, upcast_layernorm: true}",
    "dora": "{use_dora: true, additional_target: 'embed_tokens,lm_head'}",
    "galore": "{finetuning_type: full, use_adam_mini: false, optim: adafactor, optim_args: 'scale_parameter=False'}",
    "board": """
        preprocessing_num_workers: 16
        flash_attn: auto
        max_samples: 100000
        max_grad_norm: 1.0
        logging_steps: 5
        warmup_steps: 0
        report_to: none
        plot_loss: true
        ddp_timeout: 180000000
        include_num_input_tokens_seen: true
        optim: adamw_torch
        packing: false
        neat_packing: false
        train_on_prompt: false
        lora_alpha: 16
        lora_dropout: 0
        enable_thinking: true
        freeze_vision_tower: true
    """,
}


@pytest.mark.parametrize("name", sorted(HOST_RECIPES))
def test_typical_host_recipes_parse(recipe, name):
    """Read as the host reads them: OmegaConf's YAML."""
    own = OmegaConf.to_container(OmegaConf.create(yaml.safe_dump(yaml.safe_load(HOST_RECIPES[name]))))
    assert set(own) <= parse(recipe | own).given | {"resume_from_checkpoint"}


def test_values_reach_the_run_as_the_host_would_parse_them(recipe):
    """Our reading of YAML changes nothing that the host reads alike."""
    own = yaml.safe_load(HOST_RECIPES["lora"]) | {"logging_steps": 1, "reward_weights": "1"}
    raw = recipe | own | {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    model, data, training, finetuning, generating = get_train_args(dict(raw))
    arguments = parse(raw)
    assert (data, finetuning, generating) == (arguments.data, arguments.finetuning, arguments.generating)
    ours, theirs = arguments.training.to_dict(), training.to_dict()
    assert {key for key in theirs if ours[key] != theirs[key]} == set()
    changed = {key for key, value in vars(model).items() if getattr(arguments.model, key) != value}
    assert changed == {"model_max_length", "vllm_maxlen", "vllm_gpu_util"}


# Lists and commas


TORN = "a,b.py:f"


@pytest.mark.parametrize(
    ("key", "written", "expected"),
    [
        ("reward_funcs", "accuracy, length", "accuracy, length"),
        ("reward_funcs", ["accuracy", " length "], "accuracy,length"),
        ("reward_funcs", ["accuracy", TORN], ["accuracy", TORN]),
        ("reward_funcs", [TORN], [TORN]),
        ("reward_funcs", f'["{TORN}"]', [TORN]),
        ("reward_funcs", "[accuracy, length]", "[accuracy, length]"),
        ("reward_weights", [1, 0.5], "1,0.5"),
        ("dataset", ["sums,small", "gsm8k"], ["sums,small", "gsm8k"]),
        ("lora_target", ["q,k", "v"], ["q,k", "v"]),
        ("adapter_name_or_path", ["a", "b"], "a,b"),
        ("add_tokens", "[PAD],[CLS]", "[PAD],[CLS]"),
    ],
)
def test_the_items_of_a_list_stay_whole(key, written, expected):
    assert typed({key: written}) == {key: expected}
    text = written if isinstance(written, str) else json.dumps(written)
    assert typed([f"--{key}", text]) == {key: expected} or key not in LISTS, "as LLaMA Board's preview has it"
    if isinstance(written, list) and len(written) > 1:
        assert typed(flags({key: written})) == {key: expected}


LISTS = ("reward_funcs", "dataset", "lora_target", "reward_weights")


@pytest.mark.parametrize("key", ["adapter_name_or_path", "ref_model_adapters", "add_tokens", "profile_modules"])
def test_an_item_with_a_comma_where_the_host_would_split_it(key):
    with pytest.raises(
        ValueError, match=f"`{key}` has the item `a,b` with a comma, where LLaMA-Factory would split it"
    ):
        typed({key: ["a,b", "c"]})


def test_a_shell_splits_a_text_at_its_spaces():
    assert typed(["--reward_funcs", "accuracy,", "length"]) == {"reward_funcs": "accuracy, length"}


def test_a_path_with_a_comma_reaches_the_run(recipe, tmp_path):
    file = tmp_path / "recipe.yaml"
    names = ["accuracy", TORN]
    for written, overrides in (
        (names, []),
        ("accuracy", [f'reward_funcs=[accuracy,"{TORN}"]', "reward_weights=[1,2]"]),
    ):
        file.write_text(yaml.safe_dump(recipe | {"reward_funcs": written}))
        finetuning = parse(read_command_line([str(file), *overrides])).finetuning
        assert finetuning.reward_funcs == names
    assert finetuning.reward_weights == [1.0, 2.0]
    assert parse(recipe | {"reward_funcs": "accuracy, length"}).finetuning.reward_funcs == ["accuracy", "length"]
