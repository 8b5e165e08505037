"""The errors of rewards, which end a run."""

NO_REWARD_REMEDY = (
    "Check that the references and columns of the data are of the kind that the functions expect; "
    "`grpo-stage try-rewards` shows what each of them makes of the first rows."
)
SHOWN_CHARACTERS = 2000
SHOWN_TRACEBACK = 10_000


class RewardError(RuntimeError):
    """A reward function failed, or returned something that is not a score.

    The message names the function, the prompt, the completion and, where the function raised, its traceback.
    """

    def __init__(self, function: str, problem: str, *, prompt: str, completion: str, traceback: str = "") -> None:
        self.function, self.problem, self.prompt, self.completion = function, problem, prompt, completion
        parts = [
            f"reward function {function!r}: {problem}",
            f"prompt: {shorten(prompt)}",
            f"completion: {shorten(completion)}",
        ]
        super().__init__("\n".join([*parts, traceback.rstrip()[-SHOWN_TRACEBACK:]] if traceback else parts))


class RewardTimeoutError(RewardError):
    """A reward function took longer than `reward_timeout` over the completions of one rollout."""


class UnrewardedError(RuntimeError):
    """No reward function has applied to any completion for so long that none can be expected to."""


class CompletionError(RuntimeError):
    """A failure while a reward is computed, with the position in the batch of the completion that it is about."""

    error_type = RewardError

    def __init__(self, position: int, problem: str, traceback: str = "") -> None:
        super().__init__(problem)
        self.position, self.problem, self.traceback = position, problem, traceback


class CompletionTimeoutError(CompletionError):
    """A `CompletionError` of what took longer than `reward_timeout`."""

    error_type = RewardTimeoutError


def shorten(text: str) -> str:
    """The beginning of `text`, for a message."""
    if len(text) <= SHOWN_CHARACTERS:
        return text
    return f"{text[:SHOWN_CHARACTERS]}... ({len(text)} characters)"
