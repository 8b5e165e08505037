"""docs/configuration.md is what the arguments say."""

import dataclasses
from pathlib import Path

from grpo_stage.arguments import GRPOArguments
from grpo_stage.tools.cli import main
from grpo_stage.tools.configuration_docs import configuration_page


PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_not_stale():
    assert PAGE.read_text(encoding="utf-8") == configuration_page(), "run: make docs"


def test_every_key_stands_on_it_with_its_default(capsys):
    assert main(["configuration-docs"]) == 0
    page = capsys.readouterr().out
    for spec in dataclasses.fields(GRPOArguments):
        assert f"### `{spec.name}`" in page
        assert spec.metadata["help"] in page
    assert "Whole number, at least 2. Default: `8`." in page
    assert "One of `truncate`, `mask`. Default: `truncate`. Only with `rollout_correction: token or sequence`." in page
