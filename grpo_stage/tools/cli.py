"""The console command `grpo-stage`.

Exit codes: 0, nothing is wrong; 1, the command could not do its work, or the recipe is refused; 2, the command line is
wrong; 3 (`recipe_file.ATTENTION`), it did its work and found something that needs a person.
"""

import argparse
import sys
from collections.abc import Sequence

from grpo_stage import __version__
from grpo_stage.tools import (
    check,
    configuration_docs,
    doctor,
    plan,
    probe,
    profile,
    quickstart_model,
    recipe,
    report,
    serve,
    sweep,
    try_rewards,
)


SUBCOMMANDS = (
    quickstart_model,
    doctor,
    check,
    try_rewards,
    probe,
    plan,
    profile,
    sweep,
    serve,
    report,
    recipe,
    configuration_docs,
)


def build_parser() -> argparse.ArgumentParser:
    """Each module of `SUBCOMMANDS` has NAME, HELP, `add_arguments` and `run`, and imports nothing heavy at its top.

    `run` returns the exit code, or None for 0.
    """
    parser = argparse.ArgumentParser(prog="grpo-stage", description="Tools beside LLaMA-Factory's `stage: grpo`.")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in SUBCOMMANDS:
        subparser = subparsers.add_parser(
            module.NAME,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)

    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; a `ValueError` is a user's mistake and is printed without a traceback."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes `key=value` only in a row; behind an option they are left over.
    if not hasattr(args, "overrides") or any(word.startswith("-") or "=" not in word for word in rest):
        parser.parse_args(argv)  # says what is wrong
    else:
        args.overrides += rest
    try:
        return args.run(args) or 0
    except ValueError as error:
        print(f"grpo-stage: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
