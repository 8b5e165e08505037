"""How many tokens go through a model at once: a budget that shrinks if memory runs out."""

import logging
from collections.abc import Callable
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size


T = TypeVar("T")
logger = logging.getLogger(f"llamafactory.{__name__}")  # seen wherever the host's messages are


class OutOfMemory:
    """The result of a pass that ran out of memory."""

    def __init__(self, error: Exception) -> None:
        self.error = error.with_traceback(None)  # its frames hold tensors


class TokenBudget:
    """The budget of one model in one process.

    Args:
        max_tokens: of a batch, padding included.
        message: the log message when the budget is lowered, made from the new budget and the old one.
    """

    def __init__(self, max_tokens: int, message: Callable[[int, int], str]) -> None:
        self.max_tokens = max_tokens
        self._message = message

    def attempt(self, run: Callable[[], T]) -> T | OutOfMemory:
        """The result of `run`, or `OutOfMemory`. Other errors pass through."""
        try:
            return run()
        except Exception as error:
            if not should_reduce_batch_size(error):
                raise
            return OutOfMemory(error)

    def shrink(self, num_tokens: int) -> None:
        """Lower the budget to half of what did not fit."""
        before, self.max_tokens = self.max_tokens, min(self.max_tokens, num_tokens) // 2
        clear_device_cache(garbage_collection=True)
        logger.warning(self._message(self.max_tokens, before))


class PolicyBudget(TokenBudget):
    """The budget of the policy and its reference, `max_tokens_per_micro_batch`, on one rank."""

    relief: Callable[[], None] | None = None
    """Saves memory in another way, once, before micro-batches have to become smaller."""

    def __init__(self, max_tokens: int, rank: int, *, can_repeat: bool = True) -> None:
        """
        Args:
            max_tokens: of a batch, padding included.
            rank: this process.
            can_repeat: whether a pass can be made again: not where the other ranks wait in the middle of it.
        """

        def message(now: int, before: int) -> str:
            return (
                f"Out of memory on rank {rank}: the pass is done again with micro-batches of {now} tokens instead of "
                f"{before}, which changes nothing but the speed. Write `max_tokens_per_micro_batch: {now}` to start "
                "with that."
            )

        super().__init__(max_tokens, message)
        self._rank = rank
        self._can_repeat = can_repeat

    def attempt(self, run: Callable[[], T]) -> T | OutOfMemory:
        """The result of `run`, or `OutOfMemory`. Other errors pass through.

        Raises:
            RuntimeError: if memory ran out, and the pass cannot be made again.
        """
        outcome = super().attempt(run)
        if isinstance(outcome, OutOfMemory) and not self._can_repeat:
            raise RuntimeError(
                f"Out of memory on rank {self._rank}, with micro-batches of at most {self.max_tokens} tokens. The "
                "ranks hold the weights together, and the others are in the middle of the same pass, so it cannot be "
                f"made again in smaller parts. Write `max_tokens_per_micro_batch: {self.max_tokens // 2}`, and go on "
                "from the last checkpoint."
            ) from outcome.error
        return outcome

    def give_way(
        self, num_completions: int, num_tokens: int, failure: OutOfMemory, *, keeps_activations: bool = False
    ) -> None:
        """Make micro-batches smaller than one of so many completions and tokens, which did not fit.

        Args:
            num_completions: of the micro-batch.
            num_tokens: of the micro-batch.
            failure: what happened.
            keeps_activations: whether the pass was one for a gradient.

        Raises:
            RuntimeError: if there is nothing left to split.
        """
        if keeps_activations and self.relief is not None:
            self.relief()
            self.relief = None
            clear_device_cache(garbage_collection=True)
            logger.warning("Out of memory: the pass is done again with gradient checkpointing, which stays on.")
            return
        if num_completions <= 1:
            raise RuntimeError(
                f"Out of memory with a single completion of {num_tokens} tokens, prompt included, in the micro-batch: "
                "there is nothing left to split. Lower `max_new_tokens` or `cutoff_len`, leave gradient checkpointing "
                "on, give vLLM less (`vllm_gpu_util`, `vllm_sleep`), or train fewer weights (LoRA, "
                "`quantization_bit`)."
            ) from failure.error
        self.shrink(num_tokens)

    def state_dict(self) -> int:
        return self.max_tokens

    def load_state_dict(self, state: int) -> None:
        """Take the lower budget: the user may have lowered the present one, an earlier run the stored one."""
        self.max_tokens = min(self.max_tokens, state)
