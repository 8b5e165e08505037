"""What `grpo-stage check` and `probe` have found, as HTML in the Board's language; all foreign text is escaped."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from grpo_stage.algorithm.conditions import as_lines
from grpo_stage.board.locales import message, texts
from grpo_stage.board.places import Place
from grpo_stage.board.tables import number, table
from grpo_stage.board.trial import rows_of
from grpo_stage.forecast.report import Advice, Verdict
from grpo_stage.memory.parts import GIB


PlaceOf = Callable[[str], Place]


def problems_view(problems: Sequence[Mapping[str, Any]], place_of: PlaceOf, language: str) -> str:
    """The problems, each under the names of its fields, which lead there and are marked in the form.

    Args:
        problems: as `check` writes them: `text`, and the `keys` that it names.
        place_of: the field of a key.
        language: of the Board.
    """
    entries, ids = [], []
    for problem in problems:
        places = list(dict.fromkeys(map(place_of, problem["keys"])))
        ids += [place.dom_id for place in places[:1]]
        links = ", ".join(_link(place) for place in places)
        entries.append(f"<li>{links}{'<br>' if links else ''}<span>{_code(problem['text'])}</span></li>")
    marks = ", ".join(f"#{one}" for one in dict.fromkeys(ids))
    style = f"<style>{marks} {{ outline: 2px solid #dc2626; outline-offset: -2px }}</style>" if marks else ""
    head = escape(message("check_problems", language, count=len(problems)))
    return f'{style}<p class="grpo-bad">{head}</p><ol>{"".join(entries)}</ol>'


def check_view(found: Mapping[str, Any], language: str) -> str:
    """A recipe without problems: what its run will do, and what was found beside it."""
    is_sound = not (found["rewards"] or {}).keys() & {"error"} and not (found["rewards"] or {}).get("findings")
    is_sound &= not found["findings"]
    is_sound &= (found["memory"] or {}).get("fits", "error" not in (found["memory"] or {}))
    kind, head = ("grpo-good", "check_sound") if is_sound else ("grpo-bad", "check_marked")
    parts = [f'<p class="{kind}">{escape(message(head, language))}</p>']
    parts.append(_list(arithmetic_in_words(found["arithmetic"], language)))
    if found["findings"] or found["warnings"]:
        parts.append(f"<p><b>{escape(message('check_findings', language))}</b></p>")
    parts += [_list(found["findings"], "grpo-bad"), _list(found["warnings"])]
    parts.append(_folded(message("check_prompts", language), "".join(_prompts(found["prompts"], language)), True))
    parts.append(_heading("check_rewards", language) + rewards_view(found["rewards"], language))
    parts.append(_heading("check_memory", language) + memory_view(found["memory"], language))
    return "".join(parts)


def arithmetic_in_words(numbers: Mapping[str, Any], language: str) -> list[str]:
    """Sentences on a step, a rollout, the data and the run."""
    uses = "check_rollout_once" if numbers["uses_of_rollout"] == 1 else "check_rollout_often"
    values = {name: f"{value:,}" if isinstance(value, int) else f"{value:.3g}" for name, value in numbers.items()}
    per_prompt = numbers["completions_per_step"] // numbers["prompts_per_step"]
    values |= {
        "num_generations": str(per_prompt),
        "max_new_tokens": f"{numbers['sampled_tokens_per_step'] // numbers['completions_per_step']:,}",
        "mean_prompt_tokens": f"{numbers['mean_prompt_tokens']:.0f}",
    }
    names = ["check_step", uses, "check_data", "check_run"]
    names += ["check_run_most"] if numbers["is_upper_bound"] else []
    return [message(name, language, **values) for name in names]


def rewards_view(found: Mapping[str, Any] | None, language: str) -> str:
    """What a trial of the rewards has found."""
    if found is None:
        return f"<p>{escape(message('check_to_come', language))}</p>"
    if "error" in found:
        return _error(found["error"])
    functions, rows = rows_of(found)
    prompt, kind, completion, total = message("trial_headers", language).split("|")
    scores = table([prompt, kind, completion, *functions, total], rows, [5, 2, 5] + [1.5] * (len(functions) + 1))
    said = _list(found["findings"], "grpo-bad") if found["findings"] else _good("check_rewards_sound", language)
    return said + _list(found["notes"]) + _folded(message("check_scores", language), scores)


def memory_view(found: Mapping[str, Any] | None, language: str) -> str:
    """The plan of a device's memory."""
    if found is None:
        return f"<p>{escape(message('check_to_come', language))}</p>"
    if "error" in found:
        return _error(found["error"])
    budget = next(iter(found["budgets"].values()))
    peak, parts = budget["peak_bytes"], budget["phases"][budget["peak_phase"]]
    names = texts(language)["parts"]
    rows = [[names.get(name, name), _gib(size)] for name, size in sorted(parts.items(), key=lambda part: -part[1])]
    verdict = message(
        "check_fits" if found["fits"] else "check_does_not_fit",
        language,
        peak=_gib(peak),
        limit=_gib(found["usable_bytes"]),
        device=found["device"]["type"],
    )
    body = _folded(
        message("check_parts", language), table(message("memory_headers", language).split("|"), rows, [3, 1])
    )
    remedies = [
        f"{as_lines(step['keys'])}\n({message('check_saves', language, saved=_gib(step['saved']))}: {step['cost']})"
        for step in found["remedies"]
    ]
    kind = "grpo-good" if found["fits"] else "grpo-bad"
    return (
        f'<p class="{kind}">{escape(verdict)}</p>'
        + _list(found["problems"], "grpo-bad")
        + _noted("check_remedies", remedies, language)
        + body
    )


def probe_view(found: Mapping[str, Any], language: str) -> str:
    """What samples of the start model tell of the run."""
    share = message("probe_headers", language).split("|")
    rows = [
        [share[0], f"{found['num_prompts']} x {found['num_samples']}"],
        [share[1], _estimate(found["accuracy"])],
        [share[2], f"{found['always_right']:.0%} / {found['mixed']:.0%} / {found['always_wrong']:.0%}"],
        [share[3], f"{found['mean_length']:.0f} ({found['truncated']:.0%})"],
        [share[4], f"{found['tokens_per_second']:.0f}"],
    ]
    verdicts = "".join(
        f'<li class="{"grpo-bad" if verdict.needs_attention else ""}">{_code(verdict.text)}</li>'
        for verdict in (Verdict(advice=Advice(one["advice"]), text=one["text"]) for one in found["verdicts"])
    )
    return _heading("probe_result", language) + f"<ul>{verdicts}</ul>" + table(["", ""], rows, [1, 1])


def _prompts(prompts: Iterable[Mapping[str, Any]], language: str) -> Iterable[str]:
    for prompt in prompts:
        ids = prompt["token_ids"]
        reference = escape(prompt["reference"] or "–")  # noqa: RUF001
        tokens = _folded(message("check_tokens", language, count=len(ids)), f"<pre>{' '.join(map(str, ids))}</pre>")
        yield (
            f'<div class="grpo-prompt"><pre>{escape(prompt["text"])}</pre>'
            f"<p>{escape(message('check_reference', language))} <code>{reference}</code></p>{tokens}</div>"
        )


def _estimate(one: Mapping[str, Any]) -> str:
    return f"{one['value']:.1%} ({one['low']:.1%} – {one['high']:.1%})"  # noqa: RUF001


def _gib(size: float) -> str:
    return number(round(size / GIB, 2))


def _link(place: Place) -> str:
    return f'<a href="#{place.dom_id}" data-grpo-field="{place.dom_id}">{escape(place.label)}</a>'


def _code(text: str) -> str:
    """Text with what is in backquotes as code."""
    pieces = escape(text).split("`")
    if len(pieces) % 2 == 0:
        return escape(text)
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))


def _list(items: Sequence[str], kind: str = "") -> str:
    lines = "".join(f'<li class="{kind}">{_code(item)}</li>' for item in items)
    return f"<ul>{lines}</ul>" if items else ""


def _noted(name: str, items: Sequence[str], language: str) -> str:
    return f"<p><b>{escape(message(name, language))}</b></p>{_list(items)}" if items else ""


def _heading(name: str, language: str) -> str:
    return f"<h3>{escape(message(name, language))}</h3>"


def _good(name: str, language: str) -> str:
    return f'<p class="grpo-good">{escape(message(name, language))}</p>'


def _error(text: str) -> str:
    return f'<pre class="grpo-bad">{escape(text)}</pre>'


def _folded(head: str, body: str, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{escape(head)}</summary>{body}</details>"
