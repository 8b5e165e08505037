"""Configurations saved and loaded, recipes imported and exported: no choice is lost."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from gradio.components import Component

from grpo_stage.board import page_state
from grpo_stage.board.fields import FORM_FIELDS
from grpo_stage.board.imported_code import ImportedCode, to_confirm
from grpo_stage.board.recipes import export_recipe, import_recipe
from grpo_stage.host.configuration_file import read_command_line
from grpo_stage.host.parser import DERIVED_KEYS, effective_defaults, typed
from grpo_stage.host.recipe_text import read_recipe

from .conftest import REPOSITORY, Board
from .test_form import companions, values_of


RECIPES = [
    path
    for path in sorted((REPOSITORY / "yaml_examples").rglob("*.yaml"))
    if yaml.safe_load(path.read_text()).get("stage") == "grpo"
]
OTHER_FILES = sorted(set((REPOSITORY / "yaml_examples").rglob("*.yaml")) - set(RECIPES))
MADE_UP: dict[str, dict[str, Any]] = {
    "bounds of widgets": {"save_steps": 3, "logging_steps": 5000, "top_k": -1, "lora_rank": 2000, "cutoff_len": 2},
    "kinds": {
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "dataloader_pin_memory": False,
        "warmup_steps": 0.1,
        "default_system": "Say 'it', \"then\" this:\n  a, b # c",
        "reward_kwargs": {"regex": {"pattern": "a, b 'c' \"d\""}},
        "reward_weights": [1, 0.5],
        "reward_funcs": ["regex", "my rewards/some file.py:score"],
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "report_to": ["tensorboard", "wandb"],
    },
    "items with a comma": {
        "reward_funcs": ["accuracy", "my,rewards.py:score"],
        "lora_target": ["q,k", "v"],
        "dataset": ["addition,small"],
        "reward_columns": {"level": "meta.level"},
    },
    "evaluation": {"eval_dataset": "addition", "eval_strategy": "epoch", "eval_num_generations": 4, "val_size": 3},
    "no evaluation of a split": {"val_size": 0.1},
    "full": {"finetuning_type": "full", "pure_bf16": True, "lora_alpha": 7},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 0, "freeze_extra_modules": "norm"},
    "qlora": {"quantization_bit": 4, "double_quantization": False, "quantization_type": "fp4"},
    "adapters": {"adapter_name_or_path": "first,second", "create_new_adapter": True, "output_dir": "plain name"},
    "lora": {
        "lora_rank": 64,
        "use_rslora": True,
        "pissa_init": True,
        "lora_target": "q_proj,v_proj",
        "lora_dropout": 0,
    },
    "galore": {"finetuning_type": "full", "use_galore": True, "galore_rank": 4, "galore_target": "mlp"},
    "derived": {
        "vllm_maxlen": 4096,
        "vllm_gpu_util": 0.7,
        "vllm_max_lora_rank": 32,
        "vllm_config": {"max_num_seqs": 8},
    },
    "model of the host's list": {"model_name_or_path": "Qwen/Qwen2.5-1.5B-Instruct", "template": "qwen"},
    "defaults taken back": {"trust_remote_code": False, "plot_loss": False, "max_samples": 10, "flash_attn": "sdpa"},
    "fast attention": {"flash_attn": "fa2", "enable_liger_kernel": False},
    "thinking": {"enable_thinking": False, "template": "qwen3"},
    "almost nothing": {"template": None, "dataset": None, "model_name_or_path": None},
}


def load(path: Path) -> dict[str, Any]:
    return read_command_line([str(path)])  # type: ignore[return-value]


def what_runs(recipe: dict[str, Any]) -> dict[str, Any]:
    """Every key's value in a run of the recipe; of a derived key, whether it is given. Paths as they resolve."""
    written = {key: value for key, value in typed(recipe).items() if value is not None}
    values = {**effective_defaults(), **dict.fromkeys(DERIVED_KEYS), **written}
    for key in ("reward_weights", "reward_funcs"):
        if not isinstance(values[key], list):
            values[key] = [str(item) for item in str(values[key]).split(",")]
    values["lora_alpha"] = values["lora_alpha"] or 2 * values["lora_rank"]
    for key in ("output_dir", "adapter_name_or_path"):
        values[key] = values[key] and [str(Path(item).resolve()) for item in str(values[key]).split(",")]
    return values


def round_trip(board: Board, recipe: dict[str, Any]) -> dict[str, Any]:
    """Into the form as a page would hold it, and out again."""
    form = import_recipe(board.runner, recipe)
    data = {**board.data(), **form}
    Path("exported.yaml").write_text(export_recipe(board.runner._parse_train_args(data)), encoding="utf-8")
    return load(Path("exported.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_example_survives_the_form(path: Path, board: Board) -> None:
    recipe = load(path)
    assert what_runs(round_trip(board, recipe)) == what_runs(recipe)


@pytest.mark.parametrize("changes", MADE_UP.values(), ids=MADE_UP)
def test_every_kind_of_recipe_survives_the_form(changes: dict[str, Any], board: Board) -> None:
    recipe = {**load(REPOSITORY / "yaml_examples" / "quickstart.yaml"), **changes}
    assert what_runs(round_trip(board, recipe)) == what_runs(recipe)


@pytest.mark.parametrize("field", FORM_FIELDS, ids=lambda field: field.key)
def test_every_field_survives_a_file(field: Any, board: Board) -> None:
    for value in values_of(field):
        values = {**companions(field), f"train__grpo_{field.key}": value}
        made = board.arguments(**values)
        assert what_runs(round_trip(board, made)) == what_runs(made)


def test_the_form_shows_the_recipe(board: Board) -> None:
    form = board.by_id(import_recipe(board.runner, load(REPOSITORY / "yaml_examples" / "quickstart.yaml")))
    shown = {
        "top.model_name": "Custom",
        "top.model_path": "quickstart/model",
        "top.template": "smollm2",
        "train.training_stage": "GRPO",
        "train.dataset": ["addition"],
        "train.learning_rate": "0.0003",
        "train.batch_size": 8,
        "train.lora_rank": 16,
        "train.lora_alpha": 32,
        "train.compute_type": "fp32",
        "train.grpo_reward_funcs": ["accuracy"],
        "train.grpo_max_new_tokens": 16,
        "train.grpo_log_completions": True,
        "train.grpo_max_steps": 24,
        "train.grpo_seed": 44,
        "train.grpo_save_strategy": "no",
    }
    assert {key: form[key] for key in shown} == shown
    extra = json.loads(form["train.extra_args"])
    assert extra["use_cpu"] is True
    assert [
        key for key in ("lora_rank", "num_generations", "reward_funcs", "bf16", "max_steps", "seed") if key in extra
    ] == []


def test_an_imported_recipe_is_accepted(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    form = import_recipe(board.runner, load(REPOSITORY / "yaml_examples" / "quickstart.yaml"))
    assert board.runner._initialize({**board.data(), **form}, do_train=True, from_preview=True) == ""


@pytest.mark.parametrize("path", OTHER_FILES, ids=lambda path: path.stem)
def test_files_of_other_stages_are_refused(path: Path, board: Board) -> None:
    recipe = load(path)
    with pytest.raises(ValueError, match=rf"stage: {recipe.get('stage', 'none')}.*stage: grpo"):
        import_recipe(board.runner, recipe)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stage": "sft"}, "stage: sft"),
        ({"num_generatons": 4}, "num_generations"),
        ({"beta": "much"}, "a finite number"),
    ],
    ids=str,
)
def test_what_nobody_knows_is_refused(changes: dict[str, Any], said: str, board: Board) -> None:
    with pytest.raises(ValueError, match=said):
        import_recipe(board.runner, {**load(REPOSITORY / "yaml_examples" / "quickstart.yaml"), **changes})


def save_and_load(board: Board, data: dict[Any, Any]) -> dict[Any, Any]:
    said = board.by_id(board.runner.save_args(data))["train.output_box"]
    assert said == "Arguments have been saved at: llamaboard_config/saved.yaml"
    return {**board.data(), **board.runner.load_args("en", "saved.yaml")}


@pytest.mark.parametrize("field", FORM_FIELDS, ids=lambda field: field.key)
def test_every_field_is_saved_and_loaded(field: Any, board: Board) -> None:
    for value in values_of(field):
        data = board.data(**companions(field), **{f"train__grpo_{field.key}": value})
        if board.runner._initialize(data, do_train=True, from_preview=True):
            continue  # what the run would refuse cannot be saved
        loaded = save_and_load(board, data)
        assert board.runner._parse_train_args(loaded) == board.runner._parse_train_args(data)


def test_a_saved_configuration_opens_without_the_package(board: Board) -> None:
    from llamafactory.webui.manager import Manager
    from llamafactory.webui.runner import Runner

    board.runner.save_args(board.data(train__grpo_num_generations=4, train__grpo_beta=0.04))
    manager = Manager()
    for element_id, element in board.manager._id_to_elem.items():
        if "grpo_" not in element_id:
            tab, _, name = element_id.partition(".")
            manager.add_elems(tab, {name: element})
    opened = Runner(manager).load_args("en", "saved.yaml")
    values = {manager.get_id_by_elem(element): value for element, value in opened.items()}
    assert json.loads(values["train.extra_args"]) == {
        **{"optim": "adamw_torch", "num_generations": 4, "beta": 0.04},
        **{"reward_funcs": "accuracy", "log_completions": True},
    }


def test_a_configuration_of_before_a_field_existed_opens(board: Board) -> None:
    board.runner.save_args(board.data(train__grpo_num_generations=4))
    path = Path("llamaboard_config/saved.yaml")
    config = yaml.safe_load(path.read_text())
    extra = json.loads(config["train.extra_args"])
    del extra["num_generations"], config["train.warmup_steps"]
    path.write_text(yaml.safe_dump({**config, "train.extra_args": json.dumps(extra)}))
    loaded = board.by_id(board.runner.load_args("en", "saved.yaml"))
    assert loaded["train.grpo_num_generations"] == 8
    assert loaded["train.grpo_reward_funcs"] == ["accuracy"]


def test_loading_another_stage_leaves_the_panel_alone(board: Board) -> None:
    board.runner.save_args(board.data(train__training_stage="Supervised Fine-Tuning"))
    loaded = board.by_id(board.runner.load_args("en", "saved.yaml"))
    assert [element_id for element_id in loaded if "grpo_" in element_id] == []


def test_a_value_that_a_field_cannot_hold_stays_in_the_extra_arguments(board: Board) -> None:
    board.runner.save_args(board.data(train__extra_args='{"top_k": -1}'))
    loaded = board.by_id(board.runner.load_args("en", "saved.yaml"))
    assert (loaded["train.grpo_top_k"], json.loads(loaded["train.extra_args"])) == (0, {"top_k": -1})


def test_a_recipe_without_a_folder_runs_in_the_form_s(board: Board) -> None:
    """Taking it away from the run, as from the recipe, left the start without a folder."""
    recipe = load(REPOSITORY / "yaml_examples" / "quickstart.yaml")
    del recipe["output_dir"]
    form = import_recipe(board.runner, recipe)
    output_dir = board.manager.get_elem_by_id("train.output_dir")
    assert form[output_dir] == ""
    data = {**board.data(), **form, output_dir: "here"}
    assert board.runner._parse_train_args(data)["output_dir"] == "saves/Custom/lora/here"
    extra = board.manager.get_elem_by_id("train.extra_args")
    for value in ("null", '""'):
        with pytest.raises(ValueError, match='its folder stands under "Output dir"'):
            board.runner._parse_train_args({**data, extra: f'{{"output_dir": {value}}}'})


def test_a_dataset_that_is_chosen_for_a_game_after_the_import_is_used(board: Board) -> None:
    """The import compares with a form that trains on the game's rounds, which the recipe does not name."""
    recipe = load(REPOSITORY / "yaml_examples" / "quickstart.yaml")
    del recipe["dataset"]
    form = import_recipe(board.runner, recipe | {"environment": "textarena:GuessTheNumber-v0"})
    data = {**board.data(), **form}
    assert board.runner._parse_train_args(data)["dataset"] == "textarena:GuessTheNumber-v0"
    chosen = {**data, board.manager.get_elem_by_id("train.dataset"): ["addition"]}
    assert board.runner._parse_train_args(chosen)["dataset"] == "addition"


def test_no_model_is_said_to_lack_instructions_that_takes_its_own_template(board: Board) -> None:
    from llamafactory.webui.components import top

    recipe = load(REPOSITORY / "yaml_examples" / "quickstart.yaml")
    import_recipe(board.runner, recipe)
    with pytest.warns(UserWarning, match="non-instruct"):
        top.check_template("en", "default")
    import_recipe(board.runner, {key: value for key, value in recipe.items() if key != "template"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        top.check_template("en", "default")


def test_the_host_does_not_undo_what_was_loaded(board: Board) -> None:
    """Its handlers fire when a load changes model, method or stage, and fill in its own defaults."""
    from llamafactory.webui.components import top, train

    recipe = load(REPOSITORY / "yaml_examples" / "quickstart.yaml")
    import_recipe(board.runner, {**recipe, "adapter_name_or_path": "a/b"})
    assert top.get_model_info("Custom") == ("quickstart/model", "smollm2")
    assert top.list_checkpoints("Custom", "lora").constructor_args["value"] == ["a/b"]
    assert train.change_stage("GRPO")[0]["__type__"] == "update"
    # A person's own choice afterwards is the host's business.
    assert top.get_model_info("Qwen2.5-1.5B-Instruct") == ("Qwen/Qwen2.5-1.5B-Instruct", "qwen")
    assert top.list_checkpoints("Custom", "full").constructor_args["value"] is None
    # Out of the stage as well, the event of that choice keeps what fits.
    for _ in range(2):  # the event may come twice for one choice
        assert train.change_stage("Supervised Fine-Tuning")[0]["__type__"] == "update"
    assert train.change_stage("Pre-Training") == ([], True)


def test_what_a_page_has_loaded_is_that_pages(board: Board, turn_to: Callable[[str], None]) -> None:
    from llamafactory.webui.components import top, train

    recipe = load(REPOSITORY / "yaml_examples" / "quickstart.yaml")
    turn_to("first")
    import_recipe(board.runner, {**recipe, "adapter_name_or_path": "a/b"})
    train.change_stage("GRPO")
    turn_to("second")
    assert top.get_model_info("Custom") == ("", "default")
    assert top.list_checkpoints("Custom", "lora").constructor_args["value"] == []
    assert train.change_stage("Supervised Fine-Tuning") == ([], False)
    import_recipe(board.runner, {**recipe, "model_name_or_path": "other/model"})
    turn_to("first")
    assert top.get_model_info("Custom") == ("quickstart/model", "smollm2")
    assert not Path("llamaboard_cache/user_config.yaml").exists()  # the next page would start with it


def test_a_page_that_opens_while_a_run_lasts_has_its_form(
    board: Board, turn_to: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what code came from elsewhere, but not what another page has confirmed."""
    from llamafactory.webui.components import top

    monkeypatch.setattr(board.engine, "_update_component", lambda values: {})  # this Board has no tab for chat
    monkeypatch.setattr(board.engine, "demo_mode", False)

    turn_to("third")
    whole = board.data(top__model_path="of/the/run", top__template="qwen")
    data = {element: value for element, value in whole.items() if isinstance(element, Component)}
    board.runner.running, board.runner.running_data = True, data
    try:
        _, form, _ = map(board.by_id, board.engine.resume())
        assert form["train.grpo_imported_code"].value == "[]"
        assert "train.grpo_confirmed_code" not in form
        assert top.get_model_info("Custom") == ("of/the/run", "qwen")
        turn_to("fourth")
        assert top.get_model_info("Custom") == ("", "default")
    finally:
        board.runner.running, board.runner.running_data = False, None


def test_only_so_many_pages_are_kept(turn_to: Callable[[str], None]) -> None:
    for i in range(1100):
        turn_to(str(i))
        page_state.remember({"top.model_name": str(i)})
    assert len(page_state._pages) == 1000


def test_a_run_of_the_command_line_is_opened(board: Board) -> None:
    Path("saves/Custom/lora/by_hand/checkpoint-2").mkdir(parents=True)
    shown = board.by_id(board.runner.check_output_dir("en", "Custom", "lora", "by_hand"))
    assert list(shown) == ["train.output_box"]
    assert "already exists" in shown["train.output_box"]


def test_a_run_of_the_board_brings_its_form_back(board: Board) -> None:
    folder = Path("saves/Custom/lora/run")
    folder.mkdir(parents=True)
    config = board.runner._build_config_dict(board.data(train__grpo_num_generations=4))
    (folder / "llamaboard_config.yaml").write_text(yaml.safe_dump(config))
    shown = board.by_id(board.runner.check_output_dir("en", "Custom", "lora", "run"))
    assert shown["train.grpo_num_generations"] == 4


@pytest.mark.parametrize(
    "content",
    ["- a list", "broken: [", "train.nobody_has_this: 1", "train.extra_args: '{'", "train.extra_args: '[]'", "text"],
)
def test_a_broken_configuration_leaves_the_form_as_it_is(content: str, board: Board) -> None:
    folder = Path("saves/Custom/lora/run")
    for path in (Path("llamaboard_config/saved.yaml"), folder / "llamaboard_config.yaml"):
        path.parent.mkdir(parents=True)
        path.write_text(content)
    for shown in (
        board.runner.load_args("en", "saved.yaml"),
        board.runner.check_output_dir("en", "Custom", "lora", "run"),
    ):
        assert list(board.by_id(shown)) == ["train.output_box"]
        assert "is not a configuration that this Board saved" in board.by_id(shown)["train.output_box"]


BROKEN: dict[str, tuple[bytes, str]] = {
    "syntax": (b"stage: grpo\nbeta: [1, 2\nseed: : x\n", "Line 3, column 5: while parsing a flow sequence"),
    "tabs": (b"stage: grpo\n\tbeta: 1\n", "Line 2, column 1"),
    "duplicate keys": (b"stage: grpo\nbeta: 0.1\nbeta: 0.2\n", "Line 3: the key `beta` stands in line 2 already"),
    "duplicate keys below": (b"reward_kwargs:\n  a: {b: 1,\n    b: 2}\n", "Line 3: the key `b` stands in line 2"),
    "a list": (b"- stage: grpo\n", "Line 1: it is a list"),
    "text": (b"hello", "Line 1: it is a single value"),
    "nothing": (b"# a comment\n", "It is empty"),
    "deep": (b"a: " + b"[" * 100_000 + b"]" * 100_000, "nested more than 20 deep"),
    "deep mappings": (b"stage: " + b"{a: " * 5000, "nested more than 20 deep"),
    "alias bomb": (
        b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 10)) for i in range(1, 10)),
        "Line 4: with its aliases it holds more than 10000 values",
    ),
    "an alias of itself": (b"stage: &a [*a]\n", "Line 1: `*a` stands for nothing that ends above it"),
    "large": (b"a: " + b"x" * 1_000_001, "1000000 at most"),
    "binary": (bytes(range(256)), "is not UTF-8 text"),
    "UTF-16": ("stage: grpo\n".encode("utf-16"), "saved as UTF-16"),
    "control characters": (b"stage: grpo\nbeta: \x00\n", "special characters are not allowed"),
    "code": (b"stage: !!python/object/apply:os.system [ls]\n", "Line 1: the tag"),
    "a tag": (b"stage: grpo\nbeta: !secret x\n", "Line 2: the tag `!secret`"),
    "two documents": (b"stage: grpo\n---\nstage: grpo\n", "Line 2"),
    "a key that is a list": (b"? [a, b]\n: 1\n", "Line 1: a key is a name"),
}


@pytest.mark.parametrize(("content", "said"), BROKEN.values(), ids=BROKEN)
def test_a_recipe_that_cannot_be_read_is_refused_with_its_line(content: bytes, said: str) -> None:
    Path("mine.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(said)) as refusal:
        read_recipe("mine.yaml")
    assert str(refusal.value).startswith("`mine.yaml` cannot be read: ")


def test_a_recipe_with_aliases_is_read() -> None:
    Path("mine.yaml").write_text("stage: grpo\nreward_kwargs:\n  a: &a {b: 1}\n  c: *a\n  d: {<<: *a, e: 2}\n")
    assert read_recipe("mine.yaml")["reward_kwargs"] == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}}


def test_what_the_environment_holds_stays_there(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "my-own-5ecret")
    monkeypatch.setenv("MY_RATE", "1e-5")
    recipe = load(REPOSITORY / "yaml_examples" / "quickstart.yaml")
    written = {"reward_kwargs": {"accuracy": {"api_key": "${oc.env:MY_KEY}"}}, "learning_rate": "${oc.env:MY_RATE}"}
    form = board.by_id(import_recipe(board.runner, recipe | written))
    assert "5ecret" not in json.dumps(form)
    arguments = board.arguments(**{element_id.replace(".", "__"): value for element_id, value in form.items()})
    assert arguments["reward_kwargs"] == written["reward_kwargs"]
    assert arguments["learning_rate"] == 1e-5, "a field of numbers holds no text"


# Code of an imported recipe

OWN = "def score(completions): return [1.0] * len(completions)\n"


@pytest.fixture
def imported(board: Board) -> dict[str, Any]:
    """A page's values after the import of a recipe with a function of its own, by id with `__` for the dot."""
    Path("own.py").write_text(OWN)
    recipe = load(REPOSITORY / "yaml_examples" / "quickstart.yaml")
    recipe |= {"reward_funcs": "accuracy,own.py:score", "dataset_dir": str(REPOSITORY / "yaml_examples" / "data")}
    form = board.by_id(import_recipe(board.runner, recipe))
    return {element_id.replace(".", "__"): value for element_id, value in form.items()} | {"train__output_dir": "run"}


def confirmation(board: Board, form: dict[str, Any]) -> list[str]:
    """What the person ticks: all that is shown for the form."""
    shown = to_confirm(board.arguments(**form), form["train__grpo_imported_code"])
    assert all("own.py, sha256 " in text and "`score`" in text for text in shown.values())
    return list(shown)


def test_imported_code_has_to_be_confirmed(board: Board, imported: dict[str, Any]) -> None:
    said = board.runner._initialize(board.data(**imported), do_train=True, from_preview=False)
    assert "have not confirmed" in said
    assert f"{Path('own.py').resolve()}, sha256 " in said
    with pytest.raises(ValueError, match="have not confirmed"):
        board.runner.trial_arguments(board.data(**imported))
    assert board.runner._initialize(board.data(**imported), do_train=True, from_preview=True) == "", "nothing runs"

    confirmed = imported | {"train__grpo_confirmed_code": confirmation(board, imported)}
    assert board.runner._initialize(board.data(**confirmed), do_train=True, from_preview=False) == ""
    board.runner.trial_arguments(board.data(**confirmed))

    Path("own.py").write_text(OWN + "# changed\n")
    assert "has changed since" in board.runner._initialize(board.data(**confirmed), do_train=True, from_preview=False)


def test_what_a_person_types_needs_no_confirmation(board: Board, imported: dict[str, Any]) -> None:
    Path("typed.py").write_text(OWN)
    typed_in = imported | {"train__grpo_reward_funcs": ["accuracy", "typed.py:score"]}
    assert board.runner._initialize(board.data(**typed_in), do_train=True, from_preview=False) == ""
    assert board.runner._initialize(board.data(), do_train=True, from_preview=False) == ""


def test_the_list_shows_files_as_they_are(board: Board, imported: dict[str, Any]) -> None:
    panel = ImportedCode()
    arguments = board.arguments(**imported)
    shown = panel.choices(arguments)
    assert shown.visible
    ((text, name),) = shown.choices
    assert "own.py, sha256 " in text
    Path("own.py").write_text(OWN + "# changed\n")
    renewed = panel.choices(arguments, imported["train__grpo_imported_code"], [name])
    assert renewed.choices[0][0] != text
    assert renewed.value == []
    assert not panel.choices({"reward_funcs": "accuracy"}).visible
    trusting = panel.choices({"reward_funcs": "accuracy", "trust_remote_code": True, "model_name_or_path": "a/b"})
    assert trusting.choices == [("trust_remote_code: Python code from the repository of a/b", "trust_remote_code")]


def test_a_shared_recipe_holds_no_secret(board: Board) -> None:
    kwargs = {"reward_funcs": "own.py:score", "reward_kwargs": {"score": {"api_key": "my-own-5ecret", "n": 2}}}
    shared = export_recipe({"stage": "grpo", **kwargs})
    assert yaml.safe_load(shared)["reward_kwargs"] == {"score": {"api_key": "***", "n": 2}}


def test_a_saved_configuration_with_a_secret_is_its_owners_alone(board: Board) -> None:
    path = Path("llamaboard_config/saved.yaml")
    board.runner.save_args(board.data())
    assert path.stat().st_mode & 0o044
    board.runner.save_args(board.data(train__grpo_reward_kwargs='{"accuracy": {"api_key": "my-own-5ecret"}}'))
    assert path.stat().st_mode & 0o077 == 0
    assert "my-own-5ecret" in path.read_text()
