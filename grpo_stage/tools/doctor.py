"""Look over the installation, this machine and, with a recipe, what its run needs: each line ok, warn or fail.

Checks versions, the host's contract, devices, vLLM's build, FlashAttention and free memory; with a recipe also write
access, room on the disk, and whether the template and the model agree on where an answer ends. A check that breaks is
a failed line with its error, and the others go on. Loads no weights.

Exit codes: 0, nothing fails (there may be warnings); 3, a line fails; 1, the recipe cannot be read.

    grpo-stage doctor
    grpo-stage doctor yaml_examples/quickstart.yaml
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_stage.tools.finding import FAIL, OK, WARN, Finding
from grpo_stage.tools.recipe_file import ATTENTION, add_json_argument, quiet_host, read_recipe, write_json


NAME = "doctor"
HELP = "say whether the installation, the machine and a recipe's model fit together"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG", help="a recipe, a YAML or JSON file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys that replace those of the file")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    with quiet_host():
        recipe = _read(args.config, args.overrides)
        findings = examine(recipe)
    write_json(args.json, [dataclasses.asdict(finding) for finding in findings])
    if str(args.json) != "-":
        _print(findings)
    return ATTENTION if any(finding.level == FAIL for finding in findings) else 0


def _read(config: Path | None, overrides: Sequence[str]) -> Mapping[str, Any] | None:
    if config is None:
        return None
    try:
        return read_recipe(config, overrides)
    except ImportError:  # of a broken host, which a line of the report names
        import yaml

        content = yaml.safe_load(config.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{config} is no recipe: a mapping of keys is expected.") from None
        return content


def examine(recipe: Mapping[str, Any] | None) -> list[Finding]:
    """All findings about this environment, and about the recipe if there is one."""
    from grpo_stage.tools import doctor_environment, doctor_recipe

    checks: list[tuple[str, Callable[[], list[Finding]]]] = list(doctor_environment.checks(recipe))
    if recipe is not None:
        checks += doctor_recipe.checks(recipe)
    return [finding for name, check in checks for finding in guarded(name, check)]


def guarded(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """What a check finds; one that raises has found a failure."""
    try:
        return check()
    except Exception as error:  # any: what is broken here is what is looked for
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return [
            Finding(
                check=name,
                level=FAIL,
                said=f"cannot be checked: {said[:600]}",
                remedy="Mend what the error names; a package that cannot be imported is best installed anew.",
            )
        ]


def _print(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=not sys.stdout.isatty())
    styles = {OK: "green", WARN: "yellow", FAIL: "bold red"}
    for finding in findings:
        line = Text(f"{finding.level:4} ", style=styles[finding.level]).append(f"{finding.check}: ", style="bold")
        console.print(line.append(finding.said, style="default"))
        if finding.remedy:
            console.print(Text(f"     -> {finding.remedy}"))
    counts = {level: sum(finding.level == level for finding in findings) for level in (OK, WARN, FAIL)}
    console.print(Text(", ".join(f"{count} {level}" for level, count in counts.items())))
