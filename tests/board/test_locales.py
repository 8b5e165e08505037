"""Every text of ours in every language of the Board."""

import re
from importlib.resources import files
from string import Formatter
from typing import Any, get_args

import pytest
from llamafactory.webui.locales import LOCALES

from grpo_stage.board.fields import BASICS, FORM_FIELDS
from grpo_stage.board.locales import LANGUAGES, add_texts, definition, message, texts
from grpo_stage.board.run_state import Kind
from grpo_stage.board.segments import KINDS
from grpo_stage.records.activity import Doing
from grpo_stage.records.completion_groups import ORDERS
from grpo_stage.records.definitions import EVALUATION, TRAINING
from grpo_stage.report.charts import OTHER_METRICS, SECTIONS

from .conftest import Board


SCRIPTS = {
    "ru": "[\u0430-\u044f]",
    "zh": "[\u4e00-\u9fff]",
    "ko": "[\uac00-\ud7a3]",
    "ja": "[\u3040-\u30ff\u4e00-\u9fff]",
}


def test_the_languages_are_the_boards() -> None:
    from llamafactory.webui.locales import LOCALES

    assert set(LANGUAGES) == set(LOCALES["title"])


def test_every_element_of_ours_has_its_texts(board: Board) -> None:
    from llamafactory.webui.locales import LOCALES

    names = [name for name, _ in board.manager.get_elem_iter() if name.startswith("grpo_")]
    assert len(names) > len(FORM_FIELDS)
    assert [name for name in names if set(LOCALES.get(name, {})) != set(LANGUAGES)] == []


def test_no_text_is_without_an_element(board: Board) -> None:
    assert set(texts("en")["elements"]) == {n for n, _ in board.manager.get_elem_iter() if n.startswith("grpo_")}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_field_has_a_label_and_says_what_it_does(language: str) -> None:
    elements = texts(language)["elements"]
    missing = [
        (field.key, what)
        for field in FORM_FIELDS
        for what in ("label", "info")
        if not elements[field.element].get(what)
    ]
    assert missing == []
    # A label that is the bare key is what a field gets that nobody has written a label for.
    assert [field.key for field in FORM_FIELDS if elements[field.element]["label"] == field.key] == []


@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_a_language_has_what_english_has(language: str) -> None:
    english, ours = texts("en"), texts(language)
    assert {name: set(element) for name, element in ours["elements"].items()} == {
        name: set(element) for name, element in english["elements"].items()
    }
    assert set(ours["messages"]) == set(english["messages"])
    for part in ("watch", "parts", "fates"):
        assert set(ours[part]) == set(english[part])
    for name, sentence in english["messages"].items():
        assert placeholders(ours["messages"][name]) == placeholders(sentence)
        assert ours["messages"][name].count("|") == sentence.count("|")


def placeholders(sentence: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(sentence) if name}


@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_a_language_is_translated(language: str) -> None:
    same = [
        f"{name}.{what}"
        for name, element in texts(language)["elements"].items()
        for what, text in element.items()
        if not re.search(SCRIPTS[language], text, re.IGNORECASE) and text not in ("Top-p", "Top-k", "nat/token")
    ]
    assert same == []


@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_keys_and_values_stay_as_they_are_written_in_yaml(language: str) -> None:
    lost = [
        f"{name}: {code}"
        for name, element in texts("en")["elements"].items()
        for code in re.findall(r"`[^`]+`", element.get("info", ""))
        if code not in texts(language)["elements"][name]["info"]
    ]
    assert lost == []


def test_the_hosts_texts_stay_as_they_are_but_for_the_rate_that_the_stage_sets() -> None:
    rate = {language: {"label": "Rate", "info": "It is AdamW's."} for language in LANGUAGES}
    host: dict[str, Any] = {"lang": {"en": {"label": "Language"}}, "learning_rate": rate}
    ours = add_texts(host)
    assert ours["lang"] is host["lang"]
    assert ours["learning_rate"]["ru"] == {"label": "Rate", "info": f"It is AdamW's. {message('learning_rate', 'ru')}"}
    assert ours["learning_rate"]["zh"]["info"] == f"It is AdamW's.{message('learning_rate', 'zh')}"
    assert (host.keys(), rate["ru"]["info"]) == ({"lang", "learning_rate"}, "It is AdamW's.")


def test_the_language_changes_live(board: Board) -> None:
    changed = board.by_id(board.engine.change_lang("ko"))
    assert changed["train.grpo_beta"].label == texts("ko")["elements"]["grpo_beta"]["label"]


def test_messages_are_filled_in() -> None:
    assert message("trying", "en", seconds=24) == "Loading and scoring ... 24 s"


@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_the_run_view_has_its_texts_in_every_language(language: str) -> None:
    english, ours = (dict(texts(each)["view"]) for each in ("en", language))
    pairs = []
    for group in ("charts", "hints", None):
        of_english, of_ours = (texts.pop(group) if group else texts for texts in (english, ours))
        assert of_ours.keys() == of_english.keys()
        pairs += [(of_english[name], of_ours[name]) for name in of_english]
    assert [(first, second) for first, second in pairs if placeholders(first) != placeholders(second)] == []
    foreign = [second for _, second in pairs if not re.search(SCRIPTS[language], second, re.IGNORECASE)]
    assert foreign == []


def test_every_chart_and_section_has_its_text() -> None:
    titles = {text for section in SECTIONS for text in (section.title, section.about) if text}
    titles |= {chart.title for section in SECTIONS for chart in section.charts} | {OTHER_METRICS}
    assert set(texts("en")["view"]["charts"]) == titles
    assert all(name == text for name, text in texts("en")["view"]["charts"].items())
    assert texts("en")["view"]["hints"].keys() <= titles


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_hint_names_the_field_as_the_form_does(language: str) -> None:
    label = LOCALES["max_new_tokens"][language]["label"]
    assert label in texts(language)["view"]["hints"]["Truncated completions"]


def test_the_script_asks_for_texts_that_are_there() -> None:
    script = files("grpo_stage.board").joinpath("view", "run_view.js").read_text(encoding="utf-8")
    asked = set(re.findall(r'(?<!\w)t\("(\w+)"', script))
    made = {
        f"{begin}_{end}"
        for begin, ends in (
            ("tab", ("curves", "completions", "runs")),
            ("download", ("curves", "completions", "report")),
            ("state", get_args(Kind)),
            ("doing", ("starting", *get_args(Doing))),
            ("order", ORDERS),
            ("part", set(KINDS.values())),
            ("reward", ("rose", "fell", "same")),
            ("fact", ("elapsed", "left", "reward", "step_time", "rollout_rate", "update_rate")),
            ("phase", ("sync", "rollout", "canary", "reward", "logprobs", "update", "other")),
            ("column", ("compare", "run", "state", "steps", "reward", "changed", "checkpoint")),
        )
        for end in ends
    }
    assert set(texts("en")["view"]) == asked | made | {"charts", "hints"}


@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_the_metrics_of_charts_are_defined_in_every_language(language: str) -> None:
    patterns = [
        pattern.replace("{}", "x") for section in SECTIONS for chart in section.charts for pattern in chart.patterns
    ]
    rows = {
        row.names[0]: row.text
        for row in (*EVALUATION, *TRAINING)
        for name in row.names
        if any(
            re.fullmatch(pattern, re.sub(r"\{\w\}", "1", name).replace("{dataset}", "x").replace("{function}", "x"))
            for pattern in patterns
        )
    }
    ours = texts(language)["metrics"]
    assert set(ours) == set(rows)
    assert [name for name, text in ours.items() if not re.search(SCRIPTS[language], text, re.IGNORECASE)] == []


def test_a_definition_is_plain_text() -> None:
    expected = "tokens of a completion, its end token included; with tools those that the model wrote"
    assert definition("eval_completions/mean_length", "en") == expected
    assert definition("eval_completions/mean_length", "zh") == texts("zh")["metrics"]["completions/mean_length"]
    assert definition("frac_reward_zero_std", "en").startswith("share of groups in which")
    assert not re.search(r"\]\(|\(\[", definition("frac_reward_zero_std", "en"))
    assert "the same final answer (Simpson" in definition("completions/same_answer_frac", "ru")
    assert definition("no_such_metric", "ja") == ""


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_everyone_sets_says_what_to_watch_for(language: str) -> None:
    assert {field.key for field in FORM_FIELDS if field.section == BASICS} <= set(texts(language)["watch"])
