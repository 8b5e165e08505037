"""Code of a recipe that was imported into LLaMA Board: it is shown, and runs only once the user has confirmed it.

A page keeps the imported code of its recipe in a field of its own. A confirmation names the hash of each file, so it
has to be repeated after a change. Code that the user types into the form needs no confirmation.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from grpo_stage.board.locales import message
from grpo_stage.host.recipe_code import code_names, code_of


IMPORTED, CONFIRMED = "train.grpo_imported_code", "train.grpo_confirmed_code"


def of_recipe(recipe: Mapping[str, Any]) -> str:
    """The parts of an imported recipe that run code, in the form that the page keeps."""
    return json.dumps(code_names(recipe))


def to_confirm(arguments: Mapping[str, Any], imported: str) -> dict[str, str]:
    """The imported code that these arguments would run: from the text of a confirmation to the text that is shown.

    Raises:
        ValueError: if a function cannot be a reward function.
    """
    return code_of(arguments, json.loads(imported or "[]"), Path.cwd())


def refuse_unconfirmed(
    arguments: Mapping[str, Any], imported: str, confirmed: Sequence[str] | None, language: str
) -> None:
    """Refuse to run imported code that is not confirmed, or has changed since.

    Raises:
        ValueError: naming the code.
    """
    missing = [shown for name, shown in to_confirm(arguments, imported).items() if name not in (confirmed or ())]
    if missing:
        raise ValueError(message("unconfirmed", language, code="; ".join(missing)))


class ImportedCode:
    """The list in which a user confirms the code of an imported recipe; hidden if there is no such code."""

    def __init__(self) -> None:
        self.imported = gr.Textbox("[]", visible=False)
        self.confirmed = gr.CheckboxGroup([], visible=False, elem_id="grpo_confirmed_code")

    @property
    def elements(self) -> dict[str, Component]:
        return {"grpo_imported_code": self.imported, "grpo_confirmed_code": self.confirmed}

    def choices(
        self, arguments: Mapping[str, Any], imported: str | None = None, confirmed: Sequence[str] | None = None
    ) -> gr.CheckboxGroup:
        """The list for these arguments; if `imported` is None, all their code is imported."""
        try:
            found = to_confirm(arguments, of_recipe(arguments) if imported is None else imported)
        except ValueError:  # which the start and the try say
            found = {}
        kept = [name for name in confirmed or () if name in found]
        return gr.CheckboxGroup([(shown, name) for name, shown in found.items()], value=kept, visible=bool(found))

    def connect(self, runner: Any, buttons: Sequence[gr.Button], inputs: set[Component]) -> None:
        """Update the list from the present files whenever one of the buttons is about to run them."""

        def renew(data: dict[Component, Any]) -> Any:
            try:
                arguments = runner.arguments_so_far(data)
            except ValueError:  # which the start and the try say
                return gr.skip()
            return self.choices(arguments, data[self.imported], data[self.confirmed])

        for button in buttons:
            button.click(renew, inputs, [self.confirmed], queue=False, show_progress="hidden")
