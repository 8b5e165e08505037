"""Games of the package textarena as environments: `environment: textarena:GuessTheNumber-v0`.

A game for one player becomes an environment with the single tool `act`. It is made once, when the process of the tools
loads its files; each episode's process is a fork of that one and has its own copy.
"""

import difflib
import functools
import hashlib
import io
import random
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from grpo_stage.rewards.user_code import GAME, RewardCode


_DEFECTIVE = ("Countdown", "Cryptarithm", "Slitherlink", "ThreeCardMonte")
"""They pass arguments of textarena 0.7.4's own functions in the wrong order: a text becomes a reward or a player."""
_ELSEWHERE = (
    "docs/tools.md lists the games that need neither other players, nor a network, nor NLTK's word lists, such as "
    f"`environment: {GAME}GuessTheNumber-v0`."
)


def locate_game(spec: str) -> RewardCode:
    """The code of a game.

    Args:
        spec: `textarena:Name`.

    Raises:
        ValueError: if textarena is not installed, or has no such game that works.
    """
    name = spec.removeprefix(GAME)
    if find_spec("textarena") is None:
        raise ValueError(
            f"`environment: {spec}` needs the package textarena, which is not installed. Install it: `pip install "
            '"grpo-stage[textarena]"`.'
        )
    from textarena.envs.registration import ENV_REGISTRY

    if name not in ENV_REGISTRY:
        near = difflib.get_close_matches(name, ENV_REGISTRY, n=1)
        hint = f"Did you mean `{GAME}{near[0]}`? " if near else ""
        raise ValueError(f"`environment: {spec}`: textarena has no game {name!r}. {hint}{_ELSEWHERE}")
    if name.startswith(_DEFECTIVE):
        raise ValueError(
            f"`environment: {spec}`: textarena confuses the arguments of its own functions in this game, so that a "
            f"move that is not allowed has a text for a reward. Name another one: {_ELSEWHERE}"
        )
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
    """The game, or why it cannot be played here. Of this process: forks of it have copies."""
    import textarena

    try:
        with redirect_stdout(io.StringIO()):  # some print what they do
            game = textarena.make(name)
            game.reset(num_players=1, seed=0)
    except Exception as error:  # games raise whatever they come to
        words = " ".join(str(error).replace("*", "").split())
        return f"textarena's game {name!r} cannot be played here: {type(error).__name__}: {words:.200}. {_ELSEWHERE}"
    if not isinstance(game.state, textarena.SinglePlayerState):
        return f"textarena's game {name!r} is for several players, and a single model plays. {_ELSEWHERE}"
    return game


class Game:
    """A game with one player."""

    name: ClassVar[str]
    """Textarena's."""

    def reset(self, **row: Any) -> str:
        """Begin. The row is only what seeds the generators: each has a game of its own."""
        seed = random.getrandbits(32)  # before `made`, which draws numbers the first time
        game = made(self.name)
        if isinstance(game, str):
            raise ValueError(game)
        self._game, self._is_over = game, False
        with redirect_stdout(io.StringIO()):
            game.reset(num_players=1, seed=seed)
        return self._told()

    def act(self, action: str) -> str:
        """Make the next move of the game.

        Args:
            action: The move, written as the rules of the game say.
        """
        if self._is_over:
            raise ValueError("the game is over")
        with redirect_stdout(io.StringIO()):
            self._is_over, _ = self._game.step(action)
        told = self._told()
        if not self._is_over:
            return told
        _, info = self._game.close()
        return "\n".join(part for part in (told, str(info[0].get("reason") or ""), "The game is over.") if part)

    def get_reward(self) -> float:
        """The game's own; 0 for one that was not played to its end."""
        if not self._is_over:
            return 0.0
        rewards, _ = self._game.close()
        return float(rewards[0])

    def _told(self) -> str:
        """What the game has said since the last move. Its wrappers would tell the whole history each time."""
        from textarena import ObservationType

        said: Sequence[tuple[int, str, ObservationType]] = self._game.state.get_current_player_observation()
        return "\n".join(text for _, text, kind in said if kind is not ObservationType.PLAYER_ACTION)
