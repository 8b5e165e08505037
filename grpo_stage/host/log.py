"""Where our messages go: to wherever the host's go."""

from typing import Any

from llamafactory.extras import logging


def get_logger(name: str) -> Any:
    """A logger below the host's own, and so with its level and handlers: the console, and LLaMA Board's log file.

    A logger of any other name would be silent below WARNING. It has the host's `info_rank0` and its like.
    """
    return logging.get_logger(f"llamafactory.{name}")
