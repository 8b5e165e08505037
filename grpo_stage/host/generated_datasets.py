"""Datasets that are generated: `dataset: reasoning_gym:leg_counting`, a task of the package reasoning-gym, `dataset:
textarena:GuessTheNumber-v0`, rounds of the game that is the `environment`, and `dataset: example:sums` to begin with.

Their rows are written into a folder that the host's loader reads, so that mixing, `val_size` and all else are the
host's. A task's row holds how its puzzle is made again, for the reward `reasoning_gym`, which scores with the task's
own code; a game's row only differs from the others, so that its round does.
"""

import copy
import difflib
import json
import random
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamafactory.extras.constants import DATA_CONFIG

from grpo_stage.rewards.builtin.reasoning import COLUMN, puzzles
from grpo_stage.rewards.games import locate_game
from grpo_stage.rewards.user_code import GAME
from grpo_stage.rollout.curriculum import LEVEL, WINDOW


if TYPE_CHECKING:
    from llamafactory.hparams import DataArguments


PREFIX = "reasoning_gym:"
SUMS = "example:sums"
"""Sums of two numbers up to 20: SmolLM2-135M-Instruct gets one in nine right, and learns more in 20 steps."""
_EVALUATION_SEEDS = 500_000_000
"""How far an evaluation's seed is from that of training: the task draws row i from the seed plus i."""
DEFAULT_ROWS = 1000
"""Where neither `max_samples` nor the `size` in `dataset_kwargs` says how many."""


def is_generated(name: str) -> bool:
    return name.startswith((PREFIX, GAME)) or name == SUMS


def check_tasks(
    named: list[tuple[str, str]], kwargs: Mapping[str, Any], environment: str | None, has_levels: bool
) -> None:
    """Refuse tasks and games that there are not, and settings that a task does not take.

    Args:
        named: pairs of a key and the dataset that it names.
        kwargs: `dataset_kwargs`.
        environment: the key.
        has_levels: whether there is a curriculum.

    Raises:
        ValueError: naming the key and the task.
    """
    if environment is not None and environment.startswith(GAME):
        locate_game(environment)
    for key, name in named:
        if name.startswith(GAME) and name != environment:
            raise ValueError(
                f"`{key}: {name}` has rounds of a game, which the model plays if it is the `environment`: that is "
                f"{environment or 'missing'}. Write `environment: {name}`."
            )
    # One of both keys counts as that of training, the first.
    tasks = {name.removeprefix(PREFIX): key for key, name in reversed(named) if name.startswith(PREFIX)}
    if tasks and find_spec("reasoning_gym") is None:
        raise ValueError(
            f"`{next(iter(tasks.values()))}: {PREFIX}{next(iter(tasks))}` needs the package reasoning-gym, which is "
            'not installed. Install it: `pip install "grpo-stage[reasoning-gym]"`.'
        )
    for task in kwargs:
        if task not in tasks:
            raise ValueError(
                f"`dataset_kwargs` has settings of {task!r}, and `dataset` names no `{PREFIX}{task}`: they would have "
                "no effect. Name the task there, or leave them out."
            )
    for task, key in tasks.items():
        settings = kwargs.get(task, {})
        if not isinstance(settings, Mapping):
            raise ValueError(
                f"`dataset_kwargs` maps a task to its settings, and {task!r} has {settings!r}. Write for example "
                '{"leg_counting": {"max_animals": 5}}.'
            )
        where = f"`{key}: {PREFIX}{task}`"
        for each in _levels(where, task, settings) if has_levels and key == "dataset" else [{}]:
            _rows(where, task, {"seed": 0, **settings, **each, "size": 1})
    others = [name for key, name in named if key == "dataset" and not name.startswith(PREFIX)]
    if has_levels and others:
        raise ValueError(
            f"`curriculum_threshold` needs rows with levels, which `dataset: {others[0]}` has not. Name "
            f"generated tasks alone (`dataset: {PREFIX}leg_counting`), or leave `curriculum_threshold` out."
        )


def _rounds(num: int, first: int) -> list[dict[str, Any]]:
    question = "Play this game. Make each move by calling the tool `act`, until the game is over.\n\n"
    return [{"question": question, "answer": "", "round": first + i} for i in range(num)]


def _sums(num: int, is_evaluation: bool) -> list[dict[str, Any]]:
    """An evaluation has 41 of the 441, training the others."""
    pairs = [(a, b) for a in range(21) for b in range(21)]
    random.Random(0).shuffle(pairs)
    chosen = (pairs[:41] if is_evaluation else pairs[41:])[:num]
    return [{"question": f"What is {a} + {b}? Answer with the number only.", "answer": str(a + b)} for a, b in chosen]


def _rows(where: str, task: str, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=1)
        hint = f"Did you mean `{PREFIX}{near[0]}`?" if near else f"There are {', '.join(sorted(DATASETS))}."
        raise ValueError(f"{where}: reasoning-gym has no task {task!r}. {hint}")
    try:
        made = puzzles(task, json.dumps(settings, sort_keys=True))
        rows = []
        for index in range(len(made)):
            entry = {"task": task, "settings": dict(settings), "index": index}
            puzzle = made[index]
            rows.append({"question": puzzle["question"], "answer": str(puzzle["answer"]), COLUMN: json.dumps(entry)})
    except (TypeError, AssertionError, ValueError, KeyError) as error:
        raise ValueError(
            f"{where}: the task does not take {json.dumps(settings)}: {error}. Mend its "
            "settings in `dataset_kwargs`; reasoning-gym's documentation has those of each task."
        ) from error
    return rows


def _levels(where: str, task: str, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The settings of each level of a task, as the package's own curriculum has them.

    In many tasks its last level is the one before once more.
    """
    from reasoning_gym.coaching.attributes import RangeAttributeDefinition
    from reasoning_gym.factory import CURRICULA, DATASETS, create_curriculum

    if task not in CURRICULA and task in DATASETS:
        raise ValueError(
            f"{where}: reasoning-gym has no levels of the task {task!r}, which `curriculum_threshold` needs. Leave "
            "the key out, or name another task."
        )
    if task not in CURRICULA:
        return [{}]  # `_rows` says so
    curriculum = create_curriculum(task)
    attributes = list(curriculum.attributes.values())
    fields = [
        field
        for each in attributes
        for field in (
            [each.lower_field_name, each.upper_field_name]
            if isinstance(each, RangeAttributeDefinition)
            else [each.field_name]
        )
    ]
    if both := [field for field in fields if field in settings]:
        raise ValueError(
            f"`dataset_kwargs` has `{both[0]}` of the task {task!r}, which its levels decide. Leave it out, or leave "
            "`curriculum_threshold` out."
        )
    levels: list[dict[str, Any]] = []
    for level in range(max(len(each.levels) for each in attributes)):
        curriculum.set_global_level(level)
        made = curriculum.generate_configuration()
        own = {field: getattr(made, field) for field in fields}
        if own not in levels[-1:]:
            levels.append(own)
    return levels


def _rows_of_levels(where: str, task: str, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    levels = _levels(where, task, settings)
    size = settings["size"] // len(levels)
    if size < WINDOW:
        raise ValueError(
            f"{where}: {settings['size']} rows make {size} for each of its {len(levels)} levels, and "
            f"`curriculum_threshold` decides by {WINDOW} of one. Write `max_samples: {WINDOW * len(levels)}` or more, "
            "and no lower `size` in `dataset_kwargs`."
        )
    return [
        {**row, LEVEL: level}
        for level, own in enumerate(levels)
        for row in _rows(where, task, {**settings, **own, "size": size})
    ]


@contextmanager
def generated(
    data_args: "DataArguments", kwargs: Mapping[str, Any], seed: int, has_levels: bool = False
) -> Iterator["DataArguments"]:
    """The arguments with a folder in which generated datasets are files. Evaluation has other rows than training.

    With a curriculum an evaluation has rows by level of the tasks that are trained, so that its curve does not bend.

    Args:
        data_args: the host's.
        kwargs: `dataset_kwargs`.
        seed: the run's.
        has_levels: whether there is a curriculum.
    """
    named = [(key, name) for key in ("dataset", "eval_dataset") for name in getattr(data_args, key) or ()]
    if not any(is_generated(name) for _, name in named):
        yield data_args
        return
    with tempfile.TemporaryDirectory(prefix="grpo-stage-datasets-") as folder:
        data_args = copy.copy(data_args)
        trained = list(data_args.dataset or ())  # is renamed below
        descriptions = _descriptions(data_args.dataset_dir, all(is_generated(name) for _, name in named))
        for offset, key in enumerate(("dataset", "eval_dataset")):
            names = []
            for name in getattr(data_args, key) or ():
                # An evaluation's name is that of its metrics; those of training may be the same task's.
                names.append(name if key == "eval_dataset" or not is_generated(name) else f"{name}:training")
                if is_generated(name):
                    task = name.removeprefix(PREFIX)
                    settings = {"size": data_args.max_samples or DEFAULT_ROWS, "seed": seed, **kwargs.get(task, {})}
                    settings["seed"] += offset * _EVALUATION_SEEDS
                    settings["size"] = min(settings["size"], data_args.max_samples or settings["size"])
                    if name.startswith(GAME):
                        rows = _rounds(settings["size"], settings["seed"])
                    elif name == SUMS:
                        rows = _sums(settings["size"], is_evaluation=key == "eval_dataset")
                    else:
                        is_by_level = has_levels and name in trained
                        rows = (_rows_of_levels if is_by_level else _rows)(f"`{key}: {name}`", task, settings)
                    file = Path(folder, f"{len(descriptions)}.json")
                    file.write_text(json.dumps(rows), encoding="utf-8")
                    columns = {"prompt": "question", "response": "answer"}
                    descriptions[names[-1]] = {"file_name": str(file), "columns": columns}
            setattr(data_args, key, names or getattr(data_args, key))
        Path(folder, DATA_CONFIG).write_text(json.dumps(descriptions), encoding="utf-8")
        data_args.dataset_dir = folder
        yield data_args


def _descriptions(dataset_dir: Any, are_all_generated: bool) -> dict[str, Any]:
    """Those of the other datasets, with absolute paths."""
    if are_all_generated:
        return {}
    if isinstance(dataset_dir, Mapping):
        return dict(dataset_dir)
    if dataset_dir == "ONLINE" or str(dataset_dir).startswith("REMOTE:"):
        raise ValueError(
            f"`dataset` names a generated dataset and one of `dataset_dir: {dataset_dir}`, which cannot be loaded "
            "together. Describe the other one in a dataset_info.json of your own."
        )
    folder = Path(dataset_dir).absolute()
    described = json.loads((folder / DATA_CONFIG).read_text(encoding="utf-8"))
    return {
        name: {**each, "file_name": str(folder / each["file_name"])} if "file_name" in each else each
        for name, each in described.items()
    }
