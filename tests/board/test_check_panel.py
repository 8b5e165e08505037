"""What stands beside the fields: the check before the start, recipes of other systems, and the first recipe."""

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from grpo_stage.board import check_panel
from grpo_stage.board.check_view import arithmetic_in_words, check_view, memory_view, problems_view
from grpo_stage.board.locales import LANGUAGES, texts
from grpo_stage.board.places import place_of
from grpo_stage.board.porting import account_view, is_of_another_system
from grpo_stage.board.tool_process import ToolState
from grpo_stage.board.wizard import SIZES, first_recipe
from grpo_stage.host.parser import check, known_key_names

from .browser import EVIL
from .conftest import REPOSITORY, Board


NUMBERS = {
    **{"num_devices": 1, "prompts_per_step": 8, "completions_per_step": 64, "prompts_per_rollout": 32},
    **{"uses_of_rollout": 8, "sampled_tokens_per_step": 6400, "num_prompts": 1000, "mean_prompt_tokens": 40.4},
    **{"max_prompt_tokens": 64, "steps_per_epoch": 250, "num_steps": 500, "num_epochs": 2.0, "is_upper_bound": True},
}
ROW = {"prompt": EVIL, "kind": "wrong_answer", "reference": EVIL, "completion": EVIL, "rewards": {}, "reward": 0.0}
REWARDS = {"functions": [], "rows": [ROW], "attacks": [], "findings": [EVIL], "notes": [EVIL]}
MEMORY = {
    **{"fits": False, "usable_bytes": 2**30, "device": {"type": "cuda"}, "problems": [EVIL], "notes": []},
    "budgets": {"GRPO": {"peak_bytes": 2**31, "peak_phase": "update", "phases": {"update": {"adapters": 2**31}}}},
    "remedies": [{"keys": {"vllm_sleep": 1}, "saved": 2**29, "cost": EVIL}],
}
CHECKED = {
    **{"problems": [], "findings": [EVIL], "warnings": [EVIL], "arithmetic": NUMBERS, "rewards": REWARDS},
    **{"prompts": [{"text": EVIL, "token_ids": [1, 2], "reference": EVIL}], "memory": MEMORY},
}
ACCOUNT = {
    **{"system": EVIL, "refusal": EVIL},
    "keys": [
        {"key": "beta", "value": 0, "fate": "taken", "ours": {"beta": 0}, "note": EVIL, "changes_learning": False},
        {"key": EVIL, "value": [EVIL], "fate": "left", "ours": {}, "note": "", "changes_learning": True},
    ],
}


class _Tags(HTMLParser):
    """The tags of a text, and what it says."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.said = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.said += data


def views(language: str) -> dict[str, str]:
    place = place_of_nothing
    return {
        "problems": problems_view([{"text": EVIL, "keys": ["beta"]}], place, language),
        "check": check_view(CHECKED, language),
        "account": account_view(ACCOUNT, language),
    }


def place_of_nothing(key: str) -> Any:
    from grpo_stage.board.places import Place

    return Place(EVIL, "grpo_beta")


@pytest.mark.parametrize("language", LANGUAGES)
def test_foreign_text_stays_text(language: str) -> None:
    for html in views(language).values():
        found = _Tags(html)
        assert {"img", "script"} & set(found.tags) == set()
        assert EVIL in found.said


def test_arithmetic_is_told_in_every_language() -> None:
    for language in LANGUAGES:
        words = " ".join(arithmetic_in_words(NUMBERS, language))
        for number in ("8", "64", "100", "6,400", "1,000", "40", "250", "500", "32"):
            assert number in words, language
    assert arithmetic_in_words(NUMBERS, "en")[1] == "A rollout of 32 prompts serves 8 steps."


def test_memory_is_told_with_what_would_save_some() -> None:
    said = _Tags(memory_view(MEMORY, "en")).said
    assert "It does not fit: 2 of 1 GiB" in said
    assert "vllm_sleep: 1" in said
    assert "saves 0.5 GiB" in said
    assert "优化器" in texts("zh")["parts"].values()


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_key_has_a_place_in_the_form(language: str, board: Board) -> None:
    places = {key: place_of(board.manager, key, language) for key in sorted(known_key_names())}
    assert places["beta"].dom_id == "grpo_beta"
    assert places["beta"].label == texts(language)["elements"]["grpo_beta"]["label"]
    get = board.manager.get_elem_by_id
    for key, element in (("learning_rate", "train.learning_rate"), ("model_name_or_path", "top.model_path")):
        assert places[key].dom_id == f"component-{get(element)._id}"
    assert places["ddp_timeout"].label.endswith(": ddp_timeout")  # it has no field but the extra arguments


@pytest.mark.parametrize(
    ("values", "about"),
    [
        ({"train__learning_rate": "abc", "train__grpo_reward_kwargs": "{"}, ["learning_rate", "reward_kwargs"]),
        ({"train__extra_args": "{", "train__max_samples": "x"}, ["max_samples", "extra_args"]),
        ({"train__extra_args": '{"seed": 1, "seed": 2}'}, ["seed"]),
        ({"top__model_name": None, "top__model_path": "", "train__dataset": None, "train__output_dir": ""}, []),
    ],
)
def test_several_fields_are_wrong_at_once(values: dict[str, Any], about: list[str], board: Board) -> None:
    problems, arguments = board.runner.checked_form(board.data(**values))
    assert len(problems) == len(about)
    assert [key for key, text in zip(about, problems, strict=True) if key not in text] == []
    assert arguments is not None
    assert arguments["stage"] == "grpo"
    assert arguments["output_dir"] == ("" if "train__output_dir" in values else arguments["output_dir"])


@pytest.mark.parametrize(
    ("name", "content", "is_foreign"),
    [
        ("a.yaml", "stage: grpo\nbeta: 0\n", False),
        ("a.yaml", "trainer:\n  stage: x\n  n: [1, {stage: 2}]\nbeta: 0\n", True),
        ("a.yaml", "num_generations: 8\n", True),
        ("a.sh", "swift rlhf --rlhf_type grpo", True),
    ],
)
def test_a_recipe_of_another_system_is_told_by_its_keys(name: str, content: str, is_foreign: bool) -> None:
    Path(name).write_text(content)
    assert is_of_another_system(name) is is_foreign


def test_an_endless_file_of_another_system_is_refused() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 20))
    Path("bomb.yaml").write_text(bomb)
    Path("large.sh").write_text("swift rlhf " * 100_000)
    for name, said in (("bomb.yaml", "more than 10000 values"), ("large.sh", "1000000 at most")):
        with pytest.raises(ValueError, match=said):
            is_of_another_system(name)


def test_what_changes_the_learning_comes_first() -> None:
    said = _Tags(account_view(ACCOUNT | {"system": "TRL"}, "en")).said
    assert "A recipe of TRL: 2 keys, 1 of them" in said
    assert said.index("left out") < said.index("taken")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rewards", [["accuracy"], ["accuracy", "format"]])
def test_the_first_recipe_is_accepted(size: str, rewards: list[str]) -> None:
    folder = str(REPOSITORY / "yaml_examples" / "data")
    recipe = first_recipe("addition", rewards, "Qwen/Qwen2.5-0.5B-Instruct", size, folder)
    assert check({**recipe, "output_dir": "saves/first"})["template"] == "qwen"
    assert ("default_system" in recipe) is ("format" in rewards)
    assert json.dumps(recipe)


def shown(
    board: Board,
    monkeypatch: pytest.MonkeyPatch,
    states: list[ToolState],
    words: Any = check_panel._CHECK,
    **values: Any,
) -> list[str]:
    """What the result says, one update after the other, while the command goes through these states."""
    monkeypatch.setattr(check_panel, "run_tool", lambda words, arguments: (state for state in states))
    data = board.data(**values)
    updates = check_panel._run(board.runner, data, values.get("top__lang", "en"), words, check_view)
    return [_Tags(update["value"]).said for update in updates]


def test_a_check_shows_what_it_knows_so_far(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = CHECKED | {"rewards": None, "memory": None}
    states = [ToolState(1), ToolState(2, partial), ToolState(3, CHECKED, is_done=True)]
    first, second, last = shown(board, monkeypatch, states)
    assert first == "Checking ... 1 s"
    assert "Checking ... 2 s" in second
    assert second.count("To come ...") == 2
    assert "It does not fit" in last
    assert "Checking" not in last


def test_what_is_red_below_is_told_first(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    fits, fine = MEMORY | {"fits": True}, CHECKED["rewards"] | {"findings": []}
    sound = CHECKED | {"findings": [], "rewards": fine, "memory": fits}
    for rewards, memory, is_sound in (
        (fine, fits, True),
        (None, None, True),  # to come
        (fine, MEMORY, False),
        (fine | {"findings": ["an attack is paid"]}, fits, False),
        ({"error": "x"}, fits, False),
        (fine, {"error": "x"}, False),
    ):
        states = [ToolState(1, sound | {"rewards": rewards, "memory": memory}, is_done=True)]
        (said,) = shown(board, monkeypatch, states)
        assert said.startswith("A run would start: press" if is_sound else "A run would start, but see first")
    finding = '<li class="grpo-bad">rows are left out</li>'
    for changes, begin in (({"findings": ["rows are left out"]}, "grpo-bad"), ({"warnings": ["slow"]}, "grpo-good")):
        said = check_view(sound | changes, "en")
        assert said.startswith(f'<p class="{begin}">')
        assert (finding in said) == ("findings" in changes)


def test_a_probe_says_how_far_it_is(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = {"is_whole": False, "num_sampled": 4, "num_prompts": 16}
    states = [ToolState(1), ToolState(2, partial), ToolState(3, error="killed", is_done=True)]
    said = shown(board, monkeypatch, states, words=check_panel._PROBE)
    assert said[:2] == ["Loading the model and sampling ... 1 s", "Sampled 4 of 16 prompts ... 2 s"]


def test_keys_are_told_at_once_and_the_rest_when_it_is_found(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"problems": [{"text": "`beta: -1` must be", "keys": ["beta"]}, {"text": "rows", "keys": []}]}
    states = [ToolState(1), ToolState(2, found), ToolState(2, found, is_done=True)]
    wrong = {"train__grpo_beta": -1, "train__learning_rate": "fast", "top__lang": "ko"}
    said = shown(board, monkeypatch, states, **wrong)
    label = texts("ko")["elements"]["grpo_beta"]["label"]
    assert [text for text in said if label not in text or "learning_rate: fast" not in text] == []
    assert ("rows" in said[0], "rows" in said[-1]) == (False, True)


def test_a_command_that_fails_says_why(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    said = shown(board, monkeypatch, [ToolState(1), ToolState(2, error=EVIL, is_done=True)])
    assert EVIL in said[-1]


def test_the_lengths_fit_the_machine_and_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("model").mkdir()
    for positions, has_gpu, expected in ((1200, True, (688, 512)), (1200, False, (1024, 64)), (100, True, (50, 50))):
        Path("model", "config.json").write_text(json.dumps({"max_position_embeddings": positions}))
        monkeypatch.setattr("grpo_stage.board.wizard.is_accelerator_available", lambda has_gpu=has_gpu: has_gpu)
        recipe = first_recipe("addition", ["accuracy"], "model", "small", "data")
        assert (recipe["cutoff_len"], recipe["max_new_tokens"]) == expected


def test_the_answers_fill_the_form(board: Board, event_of: Callable[[str], Any]) -> None:
    Path("small model").mkdir()
    Path("small model", "config.json").write_text('{"hidden_size": 576, "max_position_embeddings": 1200}')
    answers = {
        **{"train__grpo_wizard_dataset": ["addition"], "train__grpo_wizard_rewards": ["accuracy", "own.py:score"]},
        **{"train__grpo_wizard_model": " small model ", "train__grpo_wizard_size": "small"},
    }
    data = board.data(**answers)
    values = event_of("make")(data)
    form = {board.manager._elem_to_id.get(element): value for element, value in values.items()}
    assert form["top.model_path"] == "small model"
    assert form["train.dataset"] == ["addition"]
    assert form["train.output_dir"] == "run"
    assert form["train.learning_rate"] == "3e-4"
    assert (form["train.cutoff_len"], form["train.grpo_max_new_tokens"]) == (1024, 64)
    assert form["train.grpo_reward_funcs"] == ["accuracy", "own.py:score"]
    assert (form["train.grpo_max_steps"], form["train.grpo_num_generations"], form["train.batch_size"]) == (200, 8, 8)
    assert form["train.grpo_imported_code"] == "[]"  # its functions were typed here
    assert form["train.lora_alpha"] == 32
    assert check(board.runner._parse_train_args({**data, **values}))["max_steps"] == 200
    # What is chosen above stands for an empty answer, and without a choice there are sums.
    for chosen in ([], None):
        values = event_of("make")(board.data(train__grpo_wizard_size="try", train__dataset=chosen))
        form = {board.manager._elem_to_id.get(element): value for element, value in values.items()}
        assert form["train.dataset"] == ["example:sums"]
    values = event_of("make")(board.data(train__grpo_wizard_size="try", train__dataset=["one", "two"]))
    form = {board.manager._elem_to_id.get(element): value for element, value in values.items()}
    assert (form["train.dataset"], form["top.model_path"]) == (["one", "two"], "model")


def test_what_stands_above_the_questions_is_kept(board: Board, event_of: Callable[[str], Any]) -> None:
    def made(**values: Any) -> dict[str | None, Any]:
        above = {"top__model_name": "SmolLM2-135M-Instruct", "top__model_path": "here", "top__template": "smollm2"}
        data = board.data(**{"train__grpo_wizard_size": "try", **above, **values})
        return {board.manager._elem_to_id.get(element): value for element, value in event_of("make")(data).items()}

    form = made()
    assert (form["top.model_name"], form["top.model_path"], form["top.template"]) == (
        "SmolLM2-135M-Instruct",
        "here",
        "smollm2",
    )
    assert "template" not in json.loads(form["train.extra_args"])
    assert form["train.output_dir"] == "run"
    other = made(train__grpo_wizard_model="there")
    assert (other["top.model_name"], other["top.model_path"]) == ("Custom", "there")
    assert json.loads(other["train.extra_args"])["template"] is None  # that of its tokenizer
    # A folder with a run is not gone on with: the recipe is another one.
    Path("saves/SmolLM2-135M-Instruct/lora/run/checkpoint-10").mkdir(parents=True)
    assert made()["train.output_dir"].startswith("train_20")
    assert made(train__grpo_wizard_model="there")["train.output_dir"] == "run"  # among those of another name


def test_a_recipe_of_another_system_fills_the_form(
    board: Board, event_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("trl.yaml").write_text("num_generations: 16\n")
    recipe = {"stage": "grpo", "do_train": True, "num_generations": 16, "reward_funcs": "own.py:score"}
    states = [ToolState(1), ToolState(2, ACCOUNT | {"recipe": recipe}, is_done=True)]
    monkeypatch.setattr("grpo_stage.board.porting.run_tool", lambda words: iter(states))
    data = board.data(train__grpo_import_btn="trl.yaml", train__device_count="1")
    *_, values = event_of("load")(data)
    form = {board.manager._elem_to_id.get(element): value for element, value in values.items()}
    assert form["train.grpo_num_generations"] == 16
    assert form["train.grpo_imported_code"] == '["own.py:score"]'
    (account,) = (value for element, value in values.items() if getattr(element, "elem_id", "") == "grpo_port_account")
    assert account["visible"]
    assert "renamed" not in account["value"]
    # A recipe of this stage takes the account away.
    Path("own.yaml").write_text("stage: grpo\nnum_generations: 4\n")
    *_, values = event_of("load")({**data, board.manager.get_elem_by_id("train.grpo_import_btn"): "own.yaml"})
    assert values[board.manager.get_elem_by_id("train.grpo_num_generations")] == 4
    (account,) = (value for element, value in values.items() if getattr(element, "elem_id", "") == "grpo_port_account")
    assert not account["visible"]
