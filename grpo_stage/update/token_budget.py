"""How many tokens go through a model at once, which gives way where memory runs out."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size


T = TypeVar("T")
logger = logging.getLogger(f"llamafactory.{__name__}")  # seen wherever the host's messages are


class OutOfMemory:
    """What a pass came to for which there was no memory."""

    def __init__(self, error: Exception) -> None:
        self.error = error.with_traceback(None)  # its frames hold tensors


class TokenBudget:
    """The budget of one process.

    Args:
        max_tokens: of a micro-batch, padding included.
        too_long: the error where even a single sequence, of so many tokens, does not fit.
        message: what is logged where the budget was lowered: of the new one and the one before.
    """

    def __init__(
        self, max_tokens: int, too_long: Callable[[int], Exception], message: Callable[[int, int], str]
    ) -> None:
        self.max_tokens = max_tokens
        self._too_long = too_long
        self._message = message

    def attempt(self, run: Callable[[], T]) -> T | OutOfMemory:
        """What `run` returns, or that it ran out of memory. Other errors pass through."""
        try:
            return run()
        except Exception as error:
            if not should_reduce_batch_size(error):
                raise
            return OutOfMemory(error)

    def shrink(self, shape: Sequence[int], failure: OutOfMemory) -> None:
        """Lower the budget below a batch of that shape [B, L], which did not fit.

        Raises:
            Exception: `too_long`, where there is nothing left to split.
        """
        num_rows, length = shape
        if num_rows == 1:
            raise self._too_long(length) from failure.error
        before, self.max_tokens = self.max_tokens, min(self.max_tokens, num_rows * length) // 2
        clear_device_cache(garbage_collection=True)
        logger.warning(self._message(self.max_tokens, before))

    def state_dict(self) -> int:
        return self.max_tokens

    def load_state_dict(self, state: int) -> None:
        """Either may have been lowered: by the user, or where memory ran out."""
        self.max_tokens = min(self.max_tokens, state)
