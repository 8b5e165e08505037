"""What a run did, as one HTML file that needs nothing else: summary, curves, alarms, settings, completions, time.

Several runs are drawn in the same plots, with what differs between them. A run's folder is its `output_dir`; a run
that is still going on, was stopped or has failed is shown as far as it came. Secrets are masked.

    grpo-stage report saves/quickstart
    grpo-stage report saves/seed-1 saves/seed-2 --output compare.html
"""

import argparse
import os
import sys
from pathlib import Path

from grpo_stage.tools.recipe_file import ATTENTION, add_json_argument, write_json


NAME = "report"
HELP = "make one HTML page of a run, or of several beside each other"
PAGE_NAME = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the `output_dir` of a run")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"the page (default: {PAGE_NAME} in the first run's folder)"
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Returns 3 if a run has an alarm or has failed."""
    from grpo_stage.report.facts import facts_of
    from grpo_stage.report.page import page_of

    facts = facts_of(args.runs)
    output = args.output or args.runs[0] / PAGE_NAME
    _write(output, page_of(facts))
    write_json(args.json, facts.as_dict())
    for each in facts.runs:
        print(f"{each.name}: {each.outcome.text} {' '.join([*each.sentences, *each.notes])}", file=sys.stderr)
    print(f"The page is {output} ({output.stat().st_size / 1e6:.1f} MB).", file=sys.stderr)
    return ATTENTION if any(each.alarms or each.outcome.state == "failed" for each in facts.runs) else 0


def _write(path: Path, page: str) -> None:
    """Write a page at once: one that is open in a browser may be made anew."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(page, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        raise ValueError(
            f"`--output {path}` cannot be written: {error.strerror or error}. Name another file."
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
