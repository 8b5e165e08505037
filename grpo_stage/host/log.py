"""A logger whose messages go where the host's messages go."""

from typing import Any

from llamafactory.extras import logging


def get_logger(name: str) -> Any:
    """A logger below the host's own, with its level and handlers: the console, and LLaMA Board's log file.

    A logger of any other name would be silent below WARNING. This one has the host's `info_rank0` and similar methods.
    """
    return logging.get_logger(f"llamafactory.{name}")
