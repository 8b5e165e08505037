"""Games of textarena as environments: which are offered, what a model is told, and what its play is worth."""

import copy
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo_stage.rewards import games
from grpo_stage.rewards.games import CHECKED, game_class, locate_game
from grpo_stage.rewards.user_code import is_code


GUESSING = "textarena:GuessTheNumber-v0"
ROOT = Path(__file__).resolve().parents[2]
SECTION = (ROOT / "docs" / "tools.md").read_text().partition("## Games")[2].partition("**skyrl-gym**")[0]


def begun(name: str, seed: int = 3) -> tuple[Any, str]:
    game = game_class(f"textarena:{name}")()
    random.seed(seed)
    return game, game.reset(question="a row")


def winning_moves(name: str, played: Any) -> Iterator[str]:
    """From the game's own state. At least the first half of them does not win yet."""
    env = played._game
    if name.startswith("GuessTheNumber"):
        yield f"[{env.game_number % env.max_number + 1}]"
        yield f"[{env.game_number}]"
    elif name.startswith("Mastermind"):
        code = env.state.game_state["secret_code"]
        for each in ([*code[1:], code[0]], code):
            yield f"[{' '.join(map(str, each))}]"
    elif name.startswith("Sudoku"):
        for row, column in ((i, j) for i in range(9) for j in range(9) if env.game_board[i][j] == 0):
            yield f"[{row + 1} {column + 1} {env.full_grid[row][column]}]"
    elif name.startswith("Minesweeper"):
        yield "[0 0]"
        for row, column in ((i, j) for i in range(env.rows) for j in range(env.cols)):
            if env.grid[row][column] != -1 and not env.revealed[row][column]:
                yield f"[{row} {column}]"
    else:
        while not played._is_over:
            yield from ["[hit]"] * next((hits for hits in range(9) if is_hand_won(env, hits)), 0)
            yield "[stand]"


def is_hand_won(env: Any, hits: int) -> bool:
    """Whether this many further cards win the hand of Blackjack."""
    state = random.getstate()
    trial = copy.deepcopy(env)
    before = trial.state.game_state["results_summary"].copy()
    for move in ["[hit]"] * hits + ["[stand]"]:
        if trial.state.game_state["results_summary"] == before:
            trial.step(move)
    random.setstate(state)
    return bool(trial.state.game_state["results_summary"]["win"] > before["win"])


def won(name: str, seed: int) -> tuple[list[str], float]:
    """What is said in a round that is won, the moves among it, and what it earns."""
    game, told = begun(name, seed)
    said = [told, *(move + game.act(move) for move in winning_moves(name, game))]
    assert game._is_over
    return said, game.get_reward()


def given_up(name: str, seed: int) -> tuple[float, float]:
    """What a round earns that ends by moves that are not allowed, after one move or after half of those that win."""
    earned = []
    for num in (1, len(won(name, seed)[0]) // 2):
        game, _ = begun(name, seed)
        for _, move in zip(range(num), winning_moves(name, game), strict=False):
            game.act(move)
        assert game.get_reward() == 0  # not played to its end
        said = [game.act("no move at all"), game.act("no move at all")]
        assert "no move at all" not in said[0], "tells the model its own move"
        assert said[1].endswith("The game is over.")
        earned.append(game.get_reward())
    return earned[0], earned[1]


@pytest.mark.parametrize("name", CHECKED)
def test_a_round_that_is_won_pays_and_one_that_is_given_up_does_not(name, capsys):
    for seed in range(4):
        reward = won(name, seed)[1]
        assert 0 < reward <= 1 if name.startswith("Blackjack") else reward == 1
        assert given_up(name, seed) == (0, 0)
    assert capsys.readouterr().out == ""


def rounds() -> dict[str, list[list[str]]]:
    return {name: [won(name, seed)[0] for seed in range(6)] for name in CHECKED}


def test_each_row_has_a_round_of_its_own_which_is_the_same_in_each_process():
    own = rounds()
    for name, said in own.items():
        assert len({"".join(each) for each in said}) > 3, name
    assert rounds() == own
    command = "import json; from tests.unit.test_games import rounds; print(json.dumps(rounds()))"
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    result = subprocess.run(
        [sys.executable, "-c", command],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout) == own


def test_a_lost_round_pays_less():
    game, _ = begun("Blackjack-v0")
    while not game._is_over:
        game.act("[hit]")
    assert game.get_reward() == 0
    for name in ("GuessTheNumber-v0", "Mastermind-v0"):
        game, _ = begun(name)
        wrong, right = winning_moves(name, game)
        others = (
            [f"[{i}]" for i in range(1, 21)]
            if name.startswith("Guess")
            else map("[{0[0]} {0[1]} {0[2]} {0[3]}]".format, itertools.permutations(range(1, 7), 4))
        )
        for move in [wrong, *(each for each in others if each not in (wrong, right))]:
            if not game._is_over:
                game.act(move)
        assert 0 < game.get_reward() < 1


def test_a_mine_is_a_move_that_is_not_allowed():
    game, _ = begun("Minesweeper-v0")
    env = game._game
    game.act("[0 0]")
    for cell in [(i, j) for i in range(8) for j in range(8) if env.grid[i][j] != -1 and not env.revealed[i][j]][:9]:
        game.act(f"[{cell[0]} {cell[1]}]")
    mine = next((i, j) for i in range(8) for j in range(8) if env.grid[i][j] == -1)
    assert "You hit a mine" in game.act(f"[{mine[0]} {mine[1]}]")
    assert not game._is_over
    game.act(f"[{mine[0]} {mine[1]}]")
    assert env._get_percentage_completion() > 0
    assert (game._is_over, game.get_reward()) == (True, 0)


def test_a_round_is_told_move_by_move():
    game, told = begun("GuessTheNumber-v0")
    assert "between 1 and 20" in told
    secret = game._game.game_number
    wrong = 20 if secret < 20 else 1
    assert game.act(f"I try [{wrong}]") == f"The target number is {'lower' if secret < wrong else 'higher'}."
    assert game.act(str(secret)) == "Congratulations! You guessed the correct number.\nThe game is over."
    with pytest.raises(ValueError, match="the game is over"):
        game.act(str(secret))


def test_the_page_lists_the_games_that_are_offered_and_every_other_one_for_one_player():
    """A later textarena may have other games."""
    offered, _, refused = SECTION.partition("| refused |")
    assert set(re.findall(r"`([\w-]+-v0[\w-]*)`", offered.partition("| game |")[2])) == set(CHECKED)
    source = Path(games.find_spec("textarena").origin).parent / "envs" / "__init__.py"  # type: ignore[union-attr, arg-type]
    registered = source.read_text().partition("[2 Player]")[0]
    families = {name.partition("-v0")[0] for name in re.findall(r'id="([\w-]+)"', registered)}
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", refused, re.MULTILINE))))
    assert families - {name.partition("-v0")[0] for name in CHECKED} == named


@pytest.mark.parametrize("name", ["RushHour-v0", "Klondike-v0", "TicTacToe-v0", "Sudoku-v0-hard", "Set-v0"])
def test_what_was_not_checked_is_refused_before_anything_of_it_is_imported(monkeypatch, name):
    monkeypatch.setattr(games, "find_spec", None)
    with pytest.raises(ValueError, match=rf"{name}` is none of the games that were checked.*docs/tools.md"):
        locate_game(f"textarena:{name}")


def test_a_game_that_there_is_not_and_a_package_that_is_missing(monkeypatch):
    with pytest.raises(ValueError, match=r"none of the games .* Did you mean `textarena:GuessTheNumber-v0`\?"):
        locate_game("textarena:GuessTheNumbr-v0")
    assert {locate_game(f"textarena:{name}").file.name for name in CHECKED} == {"env.py"}
    monkeypatch.setattr(games, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package textarena.*grpo-stage\[textarena\]"):
        locate_game(GUESSING)


def test_a_game_is_no_code_that_a_recipe_brings():
    assert not is_code(GUESSING)
    assert is_code("my_game.py:Game")
