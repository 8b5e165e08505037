"""Datasets that the host's Board does not expect: names that no file describes, and files that it cannot show.

A recipe brings such names, and a person may type them. The host's handlers fail on them: the page gets an error 500,
and the rest of the event does not happen. Here the handlers answer that there is nothing to see, or say why.
"""

from typing import Any

import gradio as gr
import wrapt

from grpo_stage.board.locales import message
from grpo_stage.board.page_state import this_page
from grpo_stage.board.tables import harmless


@wrapt.decorator
def only_mappings(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The datasets that a folder's file describes; what is no description is left out."""
    info = wrapped(*args, **kwargs)
    return {name: entry for name, entry in info.items() if isinstance(entry, dict)} if isinstance(info, dict) else {}


@wrapt.decorator
def none_if_not_described(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> gr.Button:
    """The button that shows rows of the first dataset; it cannot be pressed where there is nothing to show."""
    try:
        return wrapped(*args, **kwargs)
    except (LookupError, TypeError):  # of a name, or of an entry, that the file does not have as it should
        return gr.Button(interactive=False)


@wrapt.decorator
def say_why_not(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> tuple[int, list[Any], gr.Column]:
    """Rows of the first dataset. The host reads its file as JSON or text, whatever it is."""
    try:
        return wrapped(*args, **kwargs)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        gr.Warning(message("no_preview", this_page().lang, error=harmless(str(error))))
        return 0, [], gr.Column(visible=False)
