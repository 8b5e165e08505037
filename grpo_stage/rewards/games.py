"""Games of the package textarena as environments: `environment: textarena:GuessTheNumber-v0`.

A game for one player becomes an environment with the single tool `act`. It is made once, when the process of the tools
loads its files; each episode's process is a fork of that one and has its own copy.
"""

import difflib
import functools
import hashlib
import random
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from grpo_stage.rewards.user_code import GAME, RewardCode


CHECKED = (
    "Blackjack-v0",
    "Blackjack-v0-long",
    "GuessTheNumber-v0",
    "GuessTheNumber-v0-hardcore",
    "Mastermind-v0",
    "Mastermind-v0-hard",
    "Mastermind-v0-extreme",
    "Minesweeper-v0",
    "Minesweeper-v0-small",
    "Minesweeper-v0-medium",
    "Minesweeper-v0-hard",
    "Sudoku-v0",
    "Sudoku-v0-very-easy",
    "Sudoku-v0-easy",
    "Sudoku-v0-medium",
)
"""Of textarena 0.7.4, in which most games have defects: docs/tools.md."""


def locate_game(spec: str) -> RewardCode:
    """The code of a game.

    Args:
        spec: `textarena:Name`.

    Raises:
        ValueError: if the game is not one of `CHECKED`, or textarena is not installed.
    """
    name = spec.removeprefix(GAME)
    if name not in CHECKED:
        near = difflib.get_close_matches(name, CHECKED, n=1)
        hint = f"Did you mean `{GAME}{near[0]}`?" if near else f"Name one of {', '.join(CHECKED)}."
        raise ValueError(
            f"`environment: {spec}` is none of the games that were checked here, and what others of textarena pay may "
            f"be wrong: docs/tools.md has what is known of them. {hint}"
        )
    if find_spec("textarena") is None:
        raise ValueError(
            f"`environment: {spec}` needs the package textarena, which is not installed. Install it: `pip install "
            '"grpo-stage[textarena]"`.'
        )
    from textarena.envs.registration import ENV_REGISTRY

    found = find_spec(ENV_REGISTRY[name].entry_point.partition(":")[0])
    assert found is not None
    assert found.origin is not None
    file = Path(found.origin)
    return RewardCode(spec, file, hashlib.sha256(file.read_bytes()).hexdigest())


def game_class(spec: str) -> type["Game"]:
    """The environment of a game; `made` is what it plays."""
    return type("Game", (Game,), {"name": spec.removeprefix(GAME)})


@functools.cache
def made(name: str) -> Any:
    """The game. Of this process: forks of it have copies."""
    import textarena

    return textarena.make(name)


class Game:
    """A game with one player."""

    name: ClassVar[str]
    """Textarena's."""

    def reset(self, **row: Any) -> str:
        """Begin. The row is only what seeds the generators: each has a game of its own."""
        seed = random.getrandbits(32)  # before `made`, which may draw numbers the first time
        self._game, self._is_over = made(self.name), False
        self._game.reset(num_players=1, seed=seed)
        return self._told()

    def act(self, action: str) -> str:
        """Make the next move of the game.

        Args:
            action: The move, written as the rules of the game say.
        """
        if self._is_over:
            raise ValueError("the game is over")
        self._is_over, _ = self._game.step(action)
        told = self._told()
        if not self._is_over:
            return told
        _, info = self._game.close()
        return "\n".join(part for part in (told, str(info[0].get("reason") or ""), "The game is over.") if part)

    def get_reward(self) -> float:
        """The game's own. A round that was given up earns nothing: not ended, or by moves that are not allowed."""
        if not self._is_over:
            return 0.0
        rewards, info = self._game.close()
        reward = float(rewards[0])
        return min(0.0, reward) if info[0].get("invalid_move") else reward  # games pay them for what was done before

    def _told(self) -> str:
        """What the game has said since the last move. Its wrappers would tell the whole history each time."""
        from textarena import ObservationType

        said: Sequence[tuple[int, str, ObservationType]] = self._game.state.get_current_player_observation()
        return "\n".join(text for _, text, kind in said if kind is not ObservationType.PLAYER_ACTION)
