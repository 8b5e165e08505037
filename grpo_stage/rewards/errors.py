"""What stops a run because of a reward."""

SHOWN_CHARACTERS = 2000


class RewardError(RuntimeError):
    """A reward function failed, or returned something that is not a score.

    The message names the function, the prompt, the completion and, where the function raised, its traceback.
    """

    def __init__(self, function: str, problem: str, *, prompt: str, completion: str, traceback: str = "") -> None:
        self.function, self.problem, self.prompt, self.completion = function, problem, prompt, completion
        parts = [
            f"reward function {function!r}: {problem}",
            f"prompt: {_shorten(prompt)}",
            f"completion: {_shorten(completion)}",
        ]
        super().__init__("\n".join([*parts, traceback.rstrip()] if traceback else parts))


class CompletionError(RuntimeError):
    """Raised inside a reward function to say which completion it failed on, by its position in the batch."""

    def __init__(self, position: int, problem: str) -> None:
        super().__init__(problem)
        self.position = position


def _shorten(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return text
    return f"{text[:SHOWN_CHARACTERS]}... ({len(text)} characters)"
