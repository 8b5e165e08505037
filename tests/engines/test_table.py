"""The table of engines, and what of an engine is known without starting it."""

import dataclasses
import subprocess
import sys
from contextlib import nullcontext
from string import Formatter
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
from peft import LoraConfig

from grpo_stage.algorithm.conditions import refuse_broken
from grpo_stage.arguments import GRPOArguments
from grpo_stage.host.parser import effective_defaults
from grpo_stage.rollout.engines.lora import LORA_EXTRAS, lora_extras
from grpo_stage.rollout.engines.table import ENGINES
from grpo_stage.rollout.engines.vllm_options import rank_with_room
from grpo_stage.rollout.engines.vllm_rules import RANK_RULES


def test_the_table_has_the_engines_that_can_be_chosen() -> None:
    assert set(ENGINES) == set(get_args(get_type_hints(GRPOArguments)["rollout_backend"]))


def test_the_rules_are_read_without_an_engine() -> None:
    code = "import sys, grpo_stage.rollout.engines.table; print(*{'torch', 'transformers', 'vllm'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.parametrize("name", ENGINES)
def test_the_fields_of_a_rules_message_are_keys(name: str) -> None:
    fields = {
        field
        for rule in ENGINES[name].rules
        if isinstance(rule.message, str)
        for _, field, _, _ in Formatter().parse(rule.message)
        if field
    }
    assert fields <= {*effective_defaults(), "adapter_rank"}


def test_what_is_more_than_a_plain_lora_is_told_by_keys_that_peft_has() -> None:
    assert set(LORA_EXTRAS) <= {field.name for field in dataclasses.fields(LoraConfig)}
    assert lora_extras(LoraConfig(r=4, target_modules=["q_proj"]).to_dict()) == {}
    extras = lora_extras(LoraConfig(r=4, use_dora=True, rank_pattern={"q_proj": 2}).to_dict())
    assert extras == {"use_dora": True, "rank_pattern": {"q_proj": 2}}


@pytest.mark.parametrize(
    ("changed", "is_refused"),
    [({}, True), ({"is_tied": False}, False), ({"device_type": "cuda"}, False), ({"finetuning_type": "lora"}, False)],
)
def test_a_servers_reload_on_a_cpu_leaves_a_tied_output_layer(changed: dict[str, Any], is_refused: bool) -> None:
    keys = {"model_name_or_path": "a/model", "rollout_backend": "vllm_server", "finetuning_type": "full"}
    empty = dict.fromkeys(("vllm_config", "structured_outputs", "model_quantization", "model_positions"))
    facts = {"vllm_lora": "native", "vllm_server_transfer": "files", "device_type": "cpu", "is_tied": True}
    values = SimpleNamespace(**keys | empty | facts | changed)
    with pytest.raises(ValueError, match=r"packed copy.*`finetuning_type: lora`") if is_refused else nullcontext():
        ENGINES["vllm_server"].refuse_unfit(values)


@pytest.mark.parametrize(("rank", "room"), [(1, 1), (2, 8), (8, 8), (257, 320), (512, 512)])
def test_a_rank_is_rounded_up_to_one_that_vllm_makes_room_for(rank: int, room: int) -> None:
    assert rank_with_room(rank) == room
    refuse_broken(RANK_RULES, SimpleNamespace(adapter_rank=rank, vllm_max_lora_rank=room, rollout_backend="vllm"))


@pytest.mark.parametrize(
    ("rank", "own", "said"),
    [
        (513, None, "`lora_rank: 513`.*up to 512"),
        (9, 8, "below the rank.* 9 "),
        (4, 5, "`vllm_max_lora_rank: 5`.*one of 1, 8"),
    ],
)
def test_a_rank_without_room_is_refused(rank: int, own: int | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        refuse_broken(RANK_RULES, SimpleNamespace(adapter_rank=rank, vllm_max_lora_rank=own, rollout_backend="vllm"))
