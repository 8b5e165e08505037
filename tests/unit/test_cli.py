"""The console command's own part: where its words may stand, and what it exits with."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo_stage.tools import cli
from grpo_stage.tools.recipe_file import ATTENTION, add_recipe_arguments


@pytest.fixture
def taken(monkeypatch):
    """What a command that takes a recipe and an option is given."""
    given = []

    def add_arguments(parser):
        add_recipe_arguments(parser)
        parser.add_argument("--size")

    def run(args):
        given.append((args.config, args.overrides, args.size))
        return ATTENTION

    command = SimpleNamespace(NAME="look", HELP="", __doc__="", add_arguments=add_arguments, run=run)
    monkeypatch.setattr(cli, "SUBCOMMANDS", (command,))
    return given


@pytest.mark.parametrize(
    "words",
    ["x.yaml seed=1 beta=0 --size 3", "x.yaml --size 3 seed=1 beta=0", "--size 3 x.yaml seed=1 beta=0"],
)
def test_keys_stand_before_or_behind_options(taken, words):
    assert cli.main(["look", *words.split()]) == ATTENTION
    assert taken == [(Path("x.yaml"), ["seed=1", "beta=0"], "3")]


@pytest.mark.parametrize("words", ["x.yaml --size 3 seed", "x.yaml --sise=3", "x.yaml --size 3 seed=1 --other=2"])
def test_other_words_are_refused(taken, words, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["look", *words.split()])
    assert end.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err
    assert taken == []
