"""The host's own handlers with every value that a form of this stage can hold: none of them fails.

A recipe or a person can give the host's fields values that its lists do not have. A handler that fails on one is an
answer with status 500, and the rest of its event does not happen.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from grpo_stage.board.recipes import import_recipe

from .conftest import REPOSITORY, Board


ADDITION = str(REPOSITORY / "yaml_examples" / "data")
# Handlers that start a process, or write the choices of the next page.
NOT_CALLED = ("run_train", "save_config", "resume", "switch_hub")


def events(board: Board) -> Iterator[tuple[str, Any]]:
    block = board.manager.get_elem_by_id("train.grpo_tab")
    while block.parent is not None:
        block = block.parent
    for event in block.fns.values():
        module = getattr(event.fn, "__module__", "")
        name = getattr(event.fn, "__name__", "")
        if (module.startswith("llamafactory") or name in vars(type(board.runner))) and name not in NOT_CALLED:
            yield name, event


def failures(board: Board, form: dict[Any, Any]) -> list[str]:
    failed = []
    for name, event in events(board):
        data = {element: form.get(element, getattr(element, "value", None)) for element in event.inputs}
        try:
            answer = event.fn(data) if event.inputs_as_dict else event.fn(*data.values())
            if isinstance(answer, Iterator):
                list(answer)
        except gr.Error:
            pass
        except Exception as error:
            failed.append(f"{name}: {error!r}")
    return failed


RECIPE = {"stage": "grpo", "do_train": True, "reward_funcs": "accuracy"}
IMPORTED = {
    "nothing": {},
    "an unknown dataset": {"dataset": "nowhere", "dataset_dir": ADDITION, "model_name_or_path": "m"},
    "a dataset of a hub": {"dataset": "openai/gsm8k", "dataset_dir": "ONLINE", "model_name_or_path": "m"},
    "other names": {
        **{"dataset": "a,addition", "dataset_dir": ADDITION, "model_name_or_path": "Qwen/Qwen2.5-1.5B-Instruct"},
        **{"template": "no_such", "adapter_name_or_path": "x,y/z", "output_dir": "/no/such", "quantization_bit": 3},
        **{
            "quantization_method": "gptq",
            "rope_scaling": "yarn",
            "lr_scheduler_type": "no_such",
            "report_to": ["a", "b"],
        },
    },
    "another method": {"finetuning_type": "oft", "adapter_name_or_path": "x", "dataset": "nowhere"},
}


@pytest.mark.parametrize("name", IMPORTED)
def test_an_imported_recipe_fails_no_handler(name: str, board: Board) -> None:
    try:
        form = import_recipe(board.runner, {**RECIPE, **IMPORTED[name]})
    except ValueError as refusal:
        print(refusal)
        return
    assert failures(board, {**board.data(), **form}) == []


FILES = {
    "none": None,
    "no JSON": "{",
    "a list": "[]",
    "a name without a mapping": '{"addition": 1, "sums": {"file_name": "sums.json"}}',
    "no file": '{"sums": {"file_name": "sums.json"}, "addition": {"file_name": "no.json"}}',
    "another kind": '{"sums": {"file_name": 1}, "addition": {"file_name": ["a"]}}',
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("dataset", [[], ["addition"], ["nowhere"], ["sums"], None])
def test_a_folder_of_datasets_fails_no_handler(name: str, dataset: Any, board: Board) -> None:
    Path("data").mkdir()
    Path("data/sums.json").write_bytes(b"\xff\xfe not JSON")
    if FILES[name] is not None:
        Path("data/dataset_info.json").write_text(FILES[name])
    form = board.data(train__dataset_dir="data", train__dataset=dataset)
    assert failures(board, form) == []


@pytest.mark.parametrize("content", [b"{", b"\x93NUMPY", b'{"a": 1}', b"", b"[]"])
def test_preview(content, board):
    Path("data").mkdir()
    Path("data/sums.json").write_bytes(content)
    Path("data/dataset_info.json").write_text('{"sums": {"file_name": "sums.json"}}')
    form = board.data(train__dataset_dir="data", train__dataset=["sums"])
    assert failures(board, form) == []


def test_cleared(board):
    form = {}
    for element in board.manager.get_elem_list():
        if isinstance(element, gr.Dropdown):
            form[element] = [] if element.multiselect else None
        elif isinstance(element, gr.Textbox):
            form[element] = ""
        elif isinstance(element, (gr.Slider, gr.Number)):
            form[element] = None
        elif isinstance(element, gr.Checkbox):
            form[element] = False
        else:
            form[element] = None
    form[board.manager.get_elem_by_id("top.lang")] = "en"
    form[board.manager.get_elem_by_id("train.training_stage")] = "GRPO"
    form[board.manager.get_elem_by_id("top.finetuning_type")] = "lora"
    assert failures(board, form) == []
    for name in ("top.model_name", "top.model_path", "train.dataset", "train.output_dir"):
        form[board.manager.get_elem_by_id(name)] = ["x"] if name == "train.dataset" else "x"
    assert failures(board, form) == []
