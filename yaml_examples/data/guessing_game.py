"""The environment of tools_guessing_game.yaml."""

from typing import Any


class GuessingGame:
    """One guess is answered; the answer of the model, which comes next, is its second one."""

    def reset(self, secret: str, **row: Any) -> None:
        self.secret = int(secret)

    def guess(self, number: int) -> str:
        """Guess the number.

        Args:
            number: the guess.
        """
        return "right" if number == self.secret else "too low" if number < self.secret else "too high"
