"""Every shipped recipe is one that the stage accepts, and its data are what it says they are."""

import dataclasses
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml
from llamafactory import hparams
from PIL import Image

from grpo_stage.arguments import GRPOArguments, grpo_field_names


REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "yaml_examples"
RECIPES = sorted(EXAMPLES.rglob("*.yaml"))
HOST_CLASSES = (
    hparams.ModelArguments,
    hparams.DataArguments,
    hparams.TrainingArguments,
    hparams.FinetuningArguments,
    hparams.GeneratingArguments,
)
TRAINING_ONLY = {field.name for field in dataclasses.fields(hparams.TrainingArguments)} | grpo_field_names()

every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
TRAINING = [path for path in RECIPES if "\nstage:" in path.read_text()]
every_training_recipe = pytest.mark.parametrize(
    "path", [path for path in TRAINING if "\nstage: grpo\n" in path.read_text()], ids=lambda path: path.stem
)
ON_ONE_MACHINE = [
    path
    for path in TRAINING
    if "\nstage: grpo\n" in path.read_text() and path.parent.name != "scaling"  # tests/host/test_layout_plan.py
]
EXPLAINED = [path for path in TRAINING if path.parent == EXAMPLES]
"""The recipes of papers are explained by their papers."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key stands twice: {sorted(key for key in keys if keys.count(key) > 1)}"
        return super().construct_mapping(node, deep)


def load(path: Path) -> dict[str, Any]:
    return yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)


def test_the_recipes_of_the_readme_are_the_recipes_there_are() -> None:
    listed = set(re.findall(r"^\| `(\S+\.yaml)`", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert listed == {path.relative_to(EXAMPLES).as_posix() for path in RECIPES}
    assert "quickstart.yaml" in listed


def test_the_recipe_in_the_readme_has_known_keys() -> None:
    block = re.search(r"```yaml\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    known = {field.name for host_class in HOST_CLASSES for field in dataclasses.fields(host_class)}
    recipe = yaml.load(block[1], _UniqueKeyLoader)
    assert recipe["stage"] == "grpo"
    assert set(recipe) - known - grpo_field_names() == set()


@every_recipe
def test_every_key_is_known(path: Path) -> None:
    known = {field.name for host_class in HOST_CLASSES for field in dataclasses.fields(host_class)}
    assert set(load(path)) - known - grpo_field_names() == set()


@every_training_recipe
def test_the_stage_accepts_its_own_keys(path: Path) -> None:
    recipe = load(path)
    assert recipe["stage"] == "grpo"
    GRPOArguments(**{key: value for key, value in recipe.items() if key in grpo_field_names()}).validate()


@pytest.mark.parametrize("path", ON_ONE_MACHINE, ids=lambda path: path.stem)
def test_the_parser_accepts_it(path: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    from grpo_stage.host.parser import parse

    recipe = load(path)
    config = json.loads((tiny_model_dir / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32768}), encoding="utf-8")
    here = {"model_name_or_path": str(tmp_path), "output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False}
    # What an earlier run writes: an adapter, a reward model.
    adapter = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"], "base_model_name_or_path": str(tmp_path)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter), encoding="utf-8")
    here |= dict.fromkeys({"adapter_name_or_path", "reward_model"} & recipe.keys(), str(tmp_path))
    parsed = parse({**recipe, **here})
    assert parsed.finetuning.num_generations == recipe["num_generations"]
    assert parsed.generating.max_new_tokens == recipe["max_new_tokens"]
    assert parsed.training.learning_rate == recipe["learning_rate"]


@every_training_recipe
def test_the_dataset_is_listed(path: Path) -> None:
    recipe = load(path)
    listed = json.loads((REPOSITORY / recipe["dataset_dir"] / "dataset_info.json").read_text(encoding="utf-8"))
    for name in recipe["dataset"].split(","):
        entry = listed[name]
        assert "hf_hub_url" in entry or (REPOSITORY / recipe["dataset_dir"] / entry["file_name"]).is_file()


@every_recipe
def test_a_chat_recipe_has_no_training_keys(path: Path) -> None:
    recipe = load(path)
    assert "stage" in recipe or TRAINING_ONLY.isdisjoint(recipe)


@pytest.mark.parametrize("path", EXPLAINED, ids=lambda path: path.stem)
def test_it_opens_with_what_a_user_has_to_know(path: Path) -> None:
    head = path.read_text(encoding="utf-8").partition("\n### ")[0]
    assert f"\n# llamafactory-cli train yaml_examples/{path.name}\n" in head
    for part in ("\n# Hardware: ", "\n# Memory: ", "\n# What to expect: "):
        assert part in head, part


def test_the_cold_start_goes_on_from_what_its_first_file_writes() -> None:
    sft, grpo = (load(EXAMPLES / f"cold_start_{name}.yaml") for name in ("1_sft", "2_grpo"))
    assert grpo["adapter_name_or_path"] == sft["output_dir"]
    same = ("model_name_or_path", "template", "lora_rank", "lora_target", "finetuning_type")
    assert {key: grpo[key] for key in same} == {key: sft[key] for key in same}


def test_the_cold_start_data_is_what_its_script_writes() -> None:
    script = runpy.run_path(str(EXAMPLES / "data" / "make_cold_start.py"))
    made = script["rows"]()
    for name, rows in zip(("cold_start_sft", "cold_start"), made, strict=True):
        lines = (EXAMPLES / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows
    questions = [{row["question"] for row in rows} for rows in made]
    assert questions[0].isdisjoint(questions[1])
    assert len(questions[0]) == 200


def test_the_chat_loads_what_the_quick_start_writes() -> None:
    training, chat = load(EXAMPLES / "quickstart.yaml"), load(EXAMPLES / "quickstart_chat.yaml")
    assert chat["adapter_name_or_path"] == training["output_dir"]
    assert (chat["model_name_or_path"], chat["template"]) == (training["model_name_or_path"], training["template"])


def test_multiplication_is_what_its_script_writes() -> None:
    lines = (EXAMPLES / "data" / "multiplication.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    script = runpy.run_path(str(EXAMPLES / "data" / "make_multiplication.py"))
    assert rows == list(script["rows"]())
    multiply = runpy.run_path(str(EXAMPLES / "data" / "calculator.py"))["multiply"]
    for row in rows:
        *_, question, answer = (turn["value"] for turn in row["conversations"])
        a, b = question.removeprefix("What is ").removesuffix("?").split(" * ")
        assert str(multiply(int(a), int(b))) == answer


def test_the_guessing_game_is_what_its_script_writes_and_its_middle_guess_tells_the_secret() -> None:
    lines = (EXAMPLES / "data" / "guessing_game.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    script = runpy.run_path(str(EXAMPLES / "data" / "make_guessing_game.py"))
    assert rows == list(script["rows"]())
    for lowest, guess, secret, said in script["EXAMPLES"]:
        assert played(str(secret), guess) == said
        assert guess in range(lowest, lowest + 3)
    for row in rows:
        *_, question, answer = (turn["value"] for turn in row["conversations"])
        lowest = int(question.removeprefix("My number is ").split(",")[0])
        place = int(answer) - lowest
        assert played(row["secret"], lowest + 1) == ("too high", "right", "too low")[place]
        assert played(row["secret"], lowest) == ("right", "too low", "too low")[place]
    assert len({row["secret"] for row in rows}) > 50


def played(secret: str, guess: int) -> str:
    """What the example's environment says of a guess."""
    game = runpy.run_path(str(EXAMPLES / "data" / "guessing_game.py"))["GuessingGame"]()
    assert game.reset(secret=secret, prompt="another column") is None
    return game.guess(guess)


def test_addition_is_what_its_script_writes() -> None:
    lines = (EXAMPLES / "data" / "addition.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    script = runpy.run_path(str(EXAMPLES / "data" / "make_addition.py"))
    assert rows == list(script["rows"]())
    assert len({row["question"] for row in rows}) == 441
    for row in rows:
        numbers = re.fullmatch(r"What is (\d+) \+ (\d+)\? Answer with the number only\.", row["question"])
        assert numbers is not None
        assert int(row["answer"]) == sum(map(int, numbers.groups()))


def test_squares_are_what_their_script_writes(tmp_path: Path) -> None:
    data = EXAMPLES / "data"
    rows = [json.loads(line) for line in (data / "squares.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == list(runpy.run_path(str(data / "make_squares.py"))["write"](tmp_path))
    for row in rows:
        (name,) = row["images"]
        with Image.open(data / name) as ours, Image.open(tmp_path / name) as made:
            assert ours.tobytes() == made.tobytes()
            assert ours.size == (112, 112)
