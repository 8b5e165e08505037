"""The host's own handlers with the values that a form of this stage can hold: none of them fails.

A recipe or a person can give the host's fields values that its lists do not have. A handler that fails on one is an
answer with status 500, and the rest of its event does not happen.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from grpo_stage.board.recipes import import_recipe

from .conftest import REPOSITORY, Board


ADDITION = str(REPOSITORY / "yaml_examples" / "data")
MODULES = ("llamafactory.webui.control", "llamafactory.webui.components")


def failures(board: Board, form: Mapping[Any, Any]) -> list[str]:
    """What the host's handlers say that fail with this form."""
    block = board.manager.get_elem_by_id("train.grpo_tab")
    while block.parent is not None:
        block = block.parent
    failed = []
    for event in block.fns.values():
        if not getattr(event.fn, "__module__", "").startswith(MODULES) or event.fn.__name__ == "save_config":
            continue
        try:
            event.fn(*(form.get(element, getattr(element, "value", None)) for element in event.inputs))
        except Exception as error:
            failed.append(f"{event.fn.__name__}: {error!r}")
    return failed


IMPORTED = {
    "no dataset": {},
    "a dataset that no file describes": {"dataset": "nowhere", "dataset_dir": ADDITION, "model_name_or_path": "m"},
    "a dataset of a hub": {"dataset": "openai/gsm8k", "dataset_dir": "ONLINE", "model_name_or_path": "m"},
    "what no list has": {
        **{"dataset": "a,addition", "dataset_dir": ADDITION, "model_name_or_path": "Qwen/Qwen2.5-1.5B-Instruct"},
        **{"adapter_name_or_path": "x,y/z", "output_dir": "/no/such", "report_to": ["tensorboard", "wandb"]},
    },
    "another method": {"finetuning_type": "oft", "adapter_name_or_path": "x", "dataset": "nowhere"},
    "bits that no list has": {"quantization_bit": 2, "quantization_method": "gptq", "model_name_or_path": "m"},
}


@pytest.mark.parametrize("recipe", IMPORTED.values(), ids=IMPORTED)
def test_an_imported_recipe_fails_no_handler(recipe: dict[str, Any], board: Board) -> None:
    form = import_recipe(board.runner, {"stage": "grpo", "do_train": True, "reward_funcs": "accuracy", **recipe})
    assert failures(board, {**board.data(), **form}) == []


def cleared(board: Board) -> Iterator[tuple[Any, Any]]:
    """The fields that a person can clear, as they then are."""
    for element in board.manager.get_elem_list():
        if isinstance(element, gr.Textbox):
            yield element, ""
        elif isinstance(element, gr.Dropdown) and (element.multiselect or element.allow_custom_value):
            yield element, [] if element.multiselect else None


def test_a_cleared_form_fails_no_handler(board: Board) -> None:
    assert failures(board, {**board.data(), **dict(cleared(board))}) == []


DESCRIBED = {
    "no file": None,
    "no JSON": "{",
    "a list": "[]",
    "no descriptions": '{"sums": 1, "addition": ["a"]}',
    "paths that are none": '{"sums": {"file_name": 1}, "addition": {"file_name": null}}',
    "files that are not there": '{"sums": {"file_name": "no.json"}}',
}


@pytest.mark.parametrize("described", DESCRIBED.values(), ids=DESCRIBED)
def test_a_folder_of_datasets_fails_no_handler(described: str | None, board: Board) -> None:
    Path("data").mkdir()
    if described is not None:
        Path("data/dataset_info.json").write_text(described)
    for dataset in ([], ["sums"], ["addition"], ["nowhere"]):
        assert failures(board, board.data(train__dataset_dir="data", train__dataset=dataset)) == []


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b'{"a": 1}', b"", b"1"])
def test_rows_that_cannot_be_shown_are_said(content: bytes, board: Board) -> None:
    from llamafactory.webui.components.data import get_preview

    Path("data").mkdir()
    Path("data/sums.json").write_bytes(content)
    Path("data/dataset_info.json").write_text('{"sums": {"file_name": "sums.json"}}')
    with pytest.warns(UserWarning, match="The rows cannot be shown: "):
        assert get_preview("data", ["sums"], 0)[:2] == (0, [])


def test_what_is_described_is_shown_as_before(board: Board) -> None:
    from llamafactory.webui.components.data import can_preview, get_preview
    from llamafactory.webui.control import list_datasets

    assert can_preview(ADDITION, ["addition"]).constructor_args["interactive"]
    assert not can_preview(ADDITION, ["nowhere"]).constructor_args["interactive"]
    num_rows, rows, _ = get_preview(ADDITION, ["addition"], 0)
    assert (num_rows > 2, len(rows)) == (True, 2)
    assert "addition" in [name for name, _ in list_datasets(ADDITION, "GRPO").choices]
