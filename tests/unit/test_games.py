"""Games of textarena as environments: which can be played, what a model is told, and what its play is worth."""

import re
from pathlib import Path
from typing import Any

import pytest

from grpo_stage.rewards import games
from grpo_stage.rewards.games import game_class, locate_game, made
from grpo_stage.rewards.user_code import is_code


GUESSING = "textarena:GuessTheNumber-v0"
TOOLS_PAGE = Path(__file__).resolve().parents[2] / "docs" / "tools.md"


def listed_games() -> list[str]:
    (line,) = re.findall(r"^Playable without more: (.*?)\.$", TOOLS_PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return re.findall(r"`(.+?)`", line)


def begun(spec: str, seed: int = 3) -> tuple[Any, str]:
    import random

    game = game_class(spec)()
    random.seed(seed)
    return game, game.reset(question="a row")


def test_the_games_that_the_page_lists_can_be_played(capsys):
    names = listed_games()
    assert len(names) == 18
    for name in names:
        game, told = begun(f"textarena:{name}")
        assert begun(f"textarena:{name}")[1] == told, f"{name}: one seed, two games"
        said = [game.act("no move at all")]
        while not game._is_over and len(said) < 4:
            said.append(game.act("no move at all"))
        assert all(said), name
        assert "no move at all" not in said[0], f"{name} tells the model its own move"
        assert game._is_over, f"{name} goes on after a second move that is not allowed"
        assert -1 <= game.get_reward() < 1, name
    assert capsys.readouterr().out == ""


def test_every_game_for_one_player_is_listed_or_refused():
    """A later textarena may have other games, or have mended some: the page and the list of defects then change."""
    source = Path(games.find_spec("textarena").origin).parent / "envs" / "__init__.py"  # type: ignore[union-attr, arg-type]
    registered = source.read_text().partition("[2 Player]")[0]
    families = {name.partition("-v0")[0] for name in re.findall(r'id="([\w-]+)"', registered)}
    need_more = {"GuessWho", "TwentyQuestions", "Hangman", "WordLadder", "Wordle", "WordSearch", "Klondike"}
    assert families == {name.removesuffix("-v0") for name in listed_games()} | need_more | set(games._DEFECTIVE)


@pytest.mark.parametrize("name", games._DEFECTIVE)
def test_a_game_that_is_refused_as_defective_is(name):
    with pytest.raises(ValueError, match="confuses the arguments"):
        locate_game(f"textarena:{name}-v0")
    game, _ = begun(f"textarena:{name}-v0")
    with pytest.raises((ValueError, TypeError, AttributeError)):  # noqa: PT012
        for _ in range(3):
            game.act("no move at all")
        game.get_reward()
        raise AssertionError(f"{name} works: take it off the list")


def test_a_round_is_told_move_by_move_and_worth_what_the_game_says():
    game, told = begun(GUESSING)
    assert "between 1 and 20" in told
    secret = made("GuessTheNumber-v0").game_number
    wrong = 20 if secret < 20 else 1
    assert game.act(f"I try [{wrong}]") == f"The target number is {'lower' if secret < wrong else 'higher'}."
    assert game.get_reward() == 0  # not played to its end
    assert game.act(str(secret)) == "Congratulations! You guessed the correct number.\nThe game is over."
    assert game.get_reward() == 1
    with pytest.raises(ValueError, match="the game is over"):
        game.act(str(secret))


def test_rounds_differ_by_the_seed_of_their_row():
    secrets = []
    for seed in range(8):
        begun(GUESSING, seed)
        secrets.append(made("GuessTheNumber-v0").game_number)
    assert len({*secrets}) > 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("QuantumTicTacToe-v0", "for several players, and a single model plays"),
        ("TicTacToe-v0", "cannot be played here: AssertionError: The number of players has to be 2"),
        ("TwentyQuestions-v0", "cannot be played here: ValueError: OpenRouter API key not found"),
    ],
)
def test_what_one_model_cannot_play_alone_is_refused(monkeypatch, name, words):
    monkeypatch.delenv("OPENROUTER_API_KEY", raising=False)
    with pytest.raises(ValueError, match=words):
        begun(f"textarena:{name}")


def test_a_game_that_there_is_not_and_a_package_that_is_missing(monkeypatch):
    with pytest.raises(ValueError, match=r"no game 'GuessTheNumbr-v0'. Did you mean `textarena:GuessTheNumber-v0"):
        locate_game("textarena:GuessTheNumbr-v0")
    assert locate_game(GUESSING).file.name == "env.py"
    monkeypatch.setattr(games, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package textarena.*grpo-stage\[textarena\]"):
        locate_game(GUESSING)


def test_a_game_is_no_code_that_a_recipe_brings():
    assert not is_code(GUESSING)
    assert is_code("my_game.py:Game")
