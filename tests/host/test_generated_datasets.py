"""Datasets that are generated: their rows, prompts and scorer, and what is refused of them."""

import json
import re
from types import SimpleNamespace

import pytest

from grpo_stage.host.generated_datasets import _levels, check_tasks, generated
from grpo_stage.host.parser import check, parse
from grpo_stage.rewards.loading import load_rewards
from grpo_stage.types import Completion, FinishReason, Prompt, RolloutGroup


TASK = "reasoning_gym:leg_counting"
GAME = "textarena:GuessTheNumber-v0"


def rows_of(arguments, key, name):
    with open(f"{arguments.dataset_dir}/dataset_info.json") as file:
        described = json.load(file)[name]
    with open(described["file_name"]) as file:
        return json.load(file)


def make(**changes):
    keys = {"dataset": [TASK], "eval_dataset": None, "dataset_dir": "nowhere", "max_samples": 3}
    return SimpleNamespace(**keys | changes)


def test_rows_are_the_tasks_own_and_evaluation_has_others():
    import reasoning_gym

    kwargs = {"leg_counting": {"max_animals": 4}}
    with generated(make(eval_dataset=[TASK]), kwargs, seed=11) as arguments:  # type: ignore[arg-type]
        train = rows_of(arguments, "dataset", arguments.dataset[0])
        evaluation = rows_of(arguments, "eval_dataset", TASK)
        assert arguments.eval_dataset == [TASK]  # its metrics have this name
    expected = reasoning_gym.create_dataset("leg_counting", size=3, seed=11, max_animals=4)
    assert [(row["question"], row["answer"]) for row in train] == [(e["question"], e["answer"]) for e in expected]
    assert not {row["question"] for row in train} & {row["question"] for row in evaluation}


def test_sums_need_no_file_and_evaluation_has_others():
    with generated(
        make(dataset=["example:sums"], eval_dataset=["example:sums"], max_samples=None), {}, seed=3
    ) as data:
        train = rows_of(data, "dataset", data.dataset[0])  # type: ignore[index]
        evaluation = rows_of(data, "eval_dataset", "example:sums")
    assert (len(train), len(evaluation)) == (400, 41)
    assert not {row["question"] for row in train} & {row["question"] for row in evaluation}
    for row in train:
        first, second = map(int, re.findall(r"\d+", row["question"]))
        assert row["answer"] == str(first + second)
    keys = {"stage": "grpo", "do_train": True, "model_name_or_path": "model", "output_dir": "out"}
    with pytest.raises(ValueError, match="`reward_funcs` is missing"):  # of no package's own
        check({**keys, "dataset": "example:sums"})


def test_the_reward_is_the_tasks_own_score():
    with generated(make(), {}, seed=3) as arguments:  # type: ignore[arg-type]
        row = rows_of(arguments, "dataset", arguments.dataset[0])[1]
    prompt = Prompt(index=0, token_ids=(1,), messages=(), reference=row["answer"], columns=row)
    texts = [f"It is <answer> {row['answer']} </answer>", row["answer"], "<answer>7000</answer>", ""]
    completions = tuple(
        Completion(token_ids=(1,), sampling_logprobs=(0.0,), finish_reason=FinishReason.STOP, text=text)
        for text in texts
    )
    rewards = load_rewards(["reasoning_gym"], None, None, max_new_tokens=8, timeout_s=60)
    (scores,) = rewards.score([RolloutGroup(prompt=prompt, completions=completions, policy_version=0)])
    rewards.close()
    assert scores == [[1.0], [1.0], [0.0], [0.0]]


def test_other_datasets_are_found_from_the_new_folder(tmp_path):
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"sums": {"file_name": "sums.json"}, "hub": {"hf_hub_url": "a/b"}})
    )
    with generated(make(dataset=[TASK, "sums"], dataset_dir=str(tmp_path)), {}, 0) as arguments:  # type: ignore[arg-type]
        with open(f"{arguments.dataset_dir}/dataset_info.json") as file:
            described = json.load(file)
        assert described["sums"] == {"file_name": str(tmp_path / "sums.json")}
        assert described["hub"] == {"hf_hub_url": "a/b"}
    online = make(dataset=[TASK, "x"], dataset_dir="ONLINE")
    with pytest.raises(ValueError, match="cannot be loaded together"), generated(online, {}, 0):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("reasoning_gym:leg_countin", {}, "no task 'leg_countin'. Did you mean `reasoning_gym:leg_counting`"),
        (TASK, {"leg_counting": {"legs": 4}}, "does not take .*legs.*Mend its settings in `dataset_kwargs`"),
        (TASK, {"leg_counting": {"max_animals": -4}}, "does not take .*max_animals must be"),
        (TASK, {"leg_counting": 4}, "maps a task to its settings"),
        (TASK, {"chain_sum": {}}, "names no `reasoning_gym:chain_sum`: they would have no effect"),
    ],
)
def test_what_is_no_task_is_refused(name, kwargs, words):
    with pytest.raises(ValueError, match=words):
        check_tasks([("dataset", name)], kwargs, None, has_levels=False)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("grpo_stage.host.generated_datasets.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package reasoning-gym.*grpo-stage\[reasoning-gym\]"):
        check_tasks([("dataset", TASK)], {}, None, has_levels=False)


def test_one_line_gives_prompts_and_reward(recipe):
    recipe |= {"dataset": TASK, "dataset_kwargs": '{"leg_counting": {"max_animals": 4}}'}
    del recipe["reward_funcs"], recipe["dataset_dir"]
    assert check(recipe)["reward_funcs"] == "reasoning_gym"
    assert parse(recipe).finetuning.dataset_kwargs == {"leg_counting": {"max_animals": 4}}


def test_a_game_needs_no_dataset(recipe):
    recipe |= {"environment": GAME, "template": "qwen3_nothink"}
    del recipe["reward_funcs"], recipe["dataset_dir"], recipe["dataset"]
    written = check(recipe)
    assert (written["dataset"], written["reward_funcs"]) == (GAME, "environment")
    assert parse(recipe).data.dataset == [GAME]


def test_a_game_has_a_round_in_each_row():
    with generated(make(dataset=[GAME], eval_dataset=[GAME]), {}, seed=11) as arguments:  # type: ignore[arg-type]
        train = rows_of(arguments, "dataset", arguments.dataset[0])
        evaluation = rows_of(arguments, "eval_dataset", GAME)
    assert len({row["round"] for row in [*train, *evaluation]}) == 6


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (None, f"missing. Write `environment: {GAME}`"),
        ("textarena:Sudoku-v0", f"that is textarena:Sudoku-v0. Write `environment: {GAME}`"),
        ("textarena:GuessTheNumbr-v0", "none of the games that were checked"),
    ],
)
def test_rounds_of_another_game_are_refused(environment, words):
    with pytest.raises(ValueError, match=words):
        check_tasks([("dataset", GAME)], {}, environment, has_levels=False)


LEVELED = "reasoning_gym:fraction_simplification"


def test_a_curriculum_has_the_rows_of_each_level():
    import reasoning_gym
    from reasoning_gym.factory import create_curriculum

    with generated(make(dataset=[LEVELED], max_samples=100), {}, seed=11, has_levels=True) as arguments:  # type: ignore[arg-type]
        rows = rows_of(arguments, "dataset", arguments.dataset[0])
    assert [row["reasoning_gym_level"] for row in rows] == [level for level in range(3) for _ in range(33)]
    for level in range(3):
        curriculum = create_curriculum("fraction_simplification")
        curriculum.set_global_level(level)
        settings = vars(curriculum.generate_configuration({"seed": 11, "size": 33}))
        expected = reasoning_gym.create_dataset("fraction_simplification", **settings)
        assert [row["question"] for row in rows[33 * level : 33 * level + 33]] == [e["question"] for e in expected]
    entry = json.loads(rows[-1]["reasoning_gym_entry"])
    assert (entry["index"], entry["settings"]["size"]) == (32, 33)  # the scorer finds the puzzle of its level


def test_a_level_that_is_the_same_as_the_one_before_is_left_out():
    for task, num in (("fraction_simplification", 3), ("word_ladder", 2), ("leg_counting", 36)):
        assert len(_levels("", task, {})) == num, task


def test_no_level_is_lost_to_a_size_that_is_above_max_samples():
    """The host takes the first `max_samples` rows of a file."""
    kwargs = {"fraction_simplification": {"size": 2000}}
    with generated(make(dataset=[LEVELED], max_samples=100), kwargs, seed=11, has_levels=True) as arguments:  # type: ignore[arg-type]
        rows = rows_of(arguments, "dataset", arguments.dataset[0])
    assert len(rows) == 99
    assert {row["reasoning_gym_level"] for row in rows[:100]} == {0, 1, 2}


def test_an_evaluation_may_have_no_levels():
    others = ["reasoning_gym:list_functions", "reasoning_gym:caesar_cipher", "sums"]
    named = [("dataset", LEVELED), *(("eval_dataset", name) for name in (LEVELED, *others))]
    check_tasks(named, {}, None, has_levels=True)
    with pytest.raises(ValueError, match="which its levels decide"):  # a task of both keys is trained
        check_tasks([("dataset", TASK), ("eval_dataset", TASK)], {"leg_counting": {"max_animals": 4}}, None, True)
    with generated(
        make(dataset=[LEVELED], eval_dataset=[LEVELED, others[1]], max_samples=100), {}, seed=11, has_levels=True
    ) as arguments:  # type: ignore[arg-type]
        trained = rows_of(arguments, "eval_dataset", LEVELED)
        other = rows_of(arguments, "eval_dataset", others[1])
    assert {row["reasoning_gym_level"] for row in trained} == {0, 1, 2}
    assert len(other) == 100
    assert "reasoning_gym_level" not in other[0]


def test_a_level_needs_enough_rows():
    with (
        pytest.raises(ValueError, match=r"90 rows make 30 for each of its 3 levels.*Write `max_samples: 96` or more"),
        generated(make(dataset=[LEVELED], max_samples=90), {}, seed=11, has_levels=True),  # type: ignore[arg-type]
    ):
        pass


@pytest.mark.parametrize(
    ("names", "kwargs", "words"),
    [
        ([LEVELED, "sums"], {}, "needs rows with levels, which `dataset: sums` has not"),
        (["reasoning_gym:list_functions"], {}, "no levels of the task 'list_functions'"),
        (["reasoning_gym:list_functons"], {}, "no task 'list_functons'"),
        (
            [TASK],
            {"leg_counting": {"max_animals": 4}},
            "`dataset_kwargs` has `max_animals` .* which its levels decide",
        ),
        (["reasoning_gym:caesar_cipher"], {}, "does not take .*rotation must be in range"),
    ],
)
def test_what_has_no_levels_is_refused(names, kwargs, words):
    with pytest.raises(ValueError, match=words):
        check_tasks([("dataset", name) for name in names], kwargs, None, has_levels=True)
