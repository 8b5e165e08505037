"""The page: one HTML file that needs nothing else, and asks no network for anything.

All text goes through the template's escaping. The only script is ours, by its hash: a browser runs no other one, and
loads nothing, whatever a completion holds.
"""

import base64
import hashlib
import re
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup, escape

from grpo_stage.report.completions import Completions
from grpo_stage.report.facts import Facts, duration, number, share


_CODE = re.compile(r"`([^`]*)`")
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")


def page_of(facts: Facts) -> str:
    """The HTML page of these facts."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["reward_range"] = _reward_range
    environment.filters |= {"number": number, "share": share, "duration": duration, "inline": _inline}
    script = f"{_read('numbers.js')}\n\n{_read('page.js')}"
    return environment.from_string(_read("page.html.j2")).render(
        facts=facts,
        curves=_curves(facts),
        style=Markup(_read("page.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _read(name: str) -> str:
    return files("grpo_stage.report").joinpath(name).read_text(encoding="utf-8").rstrip("\n")


def _curves(facts: Facts) -> dict[str, Any]:
    """What the script draws."""
    return {
        "runs": [run.name for run in facts.runs],
        "alarms": [
            {"run": i, "step": alarm.step, "text": f"{alarm.monitor}: {alarm.seen}"}
            for i, run in enumerate(facts.runs)
            for alarm in run.alarms
        ],
        "charts": [
            {
                "unit": chart.unit,
                "stacked": chart.is_stacked,
                "curves": [
                    {
                        "run": curve.run,
                        "metric": curve.metric,
                        "x": curve.x,
                        "y": curve.y,
                        "low": curve.low,
                        "high": curve.high,
                        "num": curve.num,
                    }
                    for curve in chart.curves
                ],
            }
            for section in facts.sections
            for chart in section.charts
        ],
    }


def _reward_range(completions: Completions) -> tuple[float, float]:
    """The lowest and the highest reward of the groups, 0 included, for bars that start there."""
    rewards = [
        value for _, groups in completions.groups for group in groups for value in group.rewards if value is not None
    ]
    low, high = min([0.0, *rewards]), max([0.0, *rewards])
    return (low, high) if high > low else (low, low + 1.0)


def _inline(markdown: str) -> Markup:
    """Code and links of a line of Markdown; of links their text alone, since they lead to pages of the docs."""
    text = _LINK.sub(r"\1", str(escape(markdown)))
    return Markup(_CODE.sub(r"<code>\1</code>", text))
