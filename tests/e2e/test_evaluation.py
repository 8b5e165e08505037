"""Evaluation in the loop: its metrics, the best model, early stopping, and that training does not notice it."""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from .conftest import completions, trainer_log


EVERY_STEP = {"eval_dataset": "tens,thousand", "eval_strategy": "steps", "eval_steps": 1}


def eval_log(output_dir: str | Path) -> list[dict[str, Any]]:
    return [line for line in trainer_log(output_dir) if "eval_reward" in line]


def test_metrics_of_several_datasets_are_those_of_their_completions(recipe, run_exp, decided_model_dir, tmp_path):
    """Every completion that is scored is written down, and each metric worked out from that by enumeration."""
    scored = tmp_path / "scored.jsonl"
    (tmp_path / "graded.py").write_text(
        "import json\n\n\n"
        "def graded(prompts, completions):\n"
        f"    with open({str(scored)!r}, 'a') as file:\n"
        "        file.write(json.dumps([prompts, completions]) + '\\n')\n"
        "    return [len(text) % 3 / 2 for text in completions]\n\n\n"
        "def thousand_only(prompts, completions):\n"
        "    return [float(len(c)) if '1000' in p else None for p, c in zip(prompts, completions)]\n"
    )
    arguments = recipe(
        **EVERY_STEP,
        model_name_or_path=str(decided_model_dir),
        reward_funcs=[f"{tmp_path}/graded.py:graded", f"{tmp_path}/graded.py:thousand_only"],
        reward_weights=[2.0, 0.0],
        eval_num_generations=5,
        eval_temperature=0.3,
        max_new_tokens=1,
        max_steps=1,
    )
    run_exp(arguments)
    (logged,) = eval_log(arguments["output_dir"])

    batches = [json.loads(line) for line in scored.read_text().splitlines()]
    prompts, texts = next(batch for batch in batches if any("1000" in prompt for prompt in batch[0]))
    assert len(prompts) == (3 + 1) * 5
    groups = [(prompts[i], texts[i : i + 5]) for i in range(0, len(prompts), 5)]
    datasets = {"": groups, "tens_": groups[:3], "thousand_": groups[3:]}
    assert ["1000" in prompt for prompt, _ in groups] == [False, False, False, True]
    assert any(max(Counter(group).values()) > 1 for _, group in groups), "some answers are given twice"
    for name, own in datasets.items():
        scores = [[len(text) % 3 / 2 for text in group] for _, group in own]
        assert logged[f"eval_{name}reward"] == pytest.approx(2 * fmean(s for group in scores for s in group))
        prefix = f"eval_{name}rewards/graded"
        assert logged[f"{prefix}/mean@5"] == pytest.approx(fmean(s for group in scores for s in group))
        for k in (1, 2, 4, 5):
            expected = fmean(fmean(max(draw) >= 1 for draw in combinations(group, k)) for group in scores)
            assert logged[f"{prefix}/pass@{k}"] == pytest.approx(expected), k
        majorities = []
        for _, group in own:
            votes = Counter(text.strip().casefold() for text in group)
            winners = [text for text in group if votes[text.strip().casefold()] == max(votes.values())]
            majorities.append(fmean(len(text) % 3 == 2 for text in winners))
        assert logged[f"{prefix}/maj@5"] == pytest.approx(fmean(majorities))
        assert f"{prefix}/pass@3" not in logged
    assert logged["eval_rewards/thousand_only/frac_not_applicable"] == 0.75
    assert logged["eval_rewards/thousand_only/mean@5"] == pytest.approx(fmean(len(text) for text in groups[3][1]))
    assert "eval_tens_rewards/thousand_only/mean@5" not in logged
    assert logged["eval_completions/mean_length"] == 1.0


def test_a_greedy_evaluation_takes_the_most_probable_tokens(recipe, run_exp, decided_model_dir, tmp_path):
    scored = tmp_path / "scored.json"
    (tmp_path / "kept.py").write_text(
        "import json\n\n\n"
        "def kept(prompts, completion_ids):\n"
        "    if '1000' in prompts[-1]:\n"
        f"        open({str(scored)!r}, 'w').write(json.dumps(completion_ids))\n"
        "    return [float(sum(ids) % 1000) for ids in completion_ids]\n"
    )
    arguments = recipe(
        eval_dataset="thousand",
        eval_on_start=True,
        eval_temperature=0,
        eval_num_generations=1,
        model_name_or_path=str(decided_model_dir),
        reward_funcs=f"{tmp_path}/kept.py:kept",
        max_steps=1,
    )
    run_exp(arguments)
    model = AutoModelForCausalLM.from_pretrained(decided_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(decided_model_dir)
    text = "<|im_start|>user\nWhat is 1000 + 1000?<|im_end|>\n<|im_start|>assistant\n"
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face.<|im_end|>\n"
    ids = tokenizer(system + text, return_tensors="pt", add_special_tokens=False)
    greedy = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
    assert json.loads(scored.read_text()) == [greedy]
    (logged,) = eval_log(arguments["output_dir"])
    assert logged["current_steps"] == 0
    assert logged["eval_rewards/kept/mean@1"] == logged["eval_reward"] == sum(greedy) % 1000


# Evaluation number n of a run gives this mean, whatever is sampled: the best is the second.
SCRIPT = [0.25, 1.0, 0.5, 0.25, 0.75]


@pytest.fixture
def scripted(tmp_path: Path) -> str:
    """A reward whose evaluations are told beforehand; it counts them in a file."""
    count = tmp_path / "count"
    (tmp_path / "scripted.py").write_text(
        "import os\n\n\n"
        "def scripted(prompts, completion_ids):\n"
        "    if '1000' not in prompts[0]:\n"
        "        return [sum(ids) % 7 / 7 for ids in completion_ids]\n"
        f"    with open({str(count)!r}, 'a') as file:\n"
        "        file.write('.')\n"
        f"    share = {SCRIPT}[min(os.path.getsize({str(count)!r}), {len(SCRIPT)}) - 1]\n"
        "    return [float(i < share * len(prompts)) for i in range(len(prompts))]\n"
    )
    return f"{tmp_path}/scripted.py:scripted"


@pytest.mark.parametrize(
    ("save_strategy", "metric"), [("steps", "eval_reward"), ("best", "eval_rewards/scripted/pass@2")]
)
def test_the_best_model_is_kept_and_the_run_stops_early(recipe, run_exp, scripted, save_strategy, metric):
    arguments = recipe(
        eval_dataset="thousand",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy=save_strategy,
        save_steps=1,
        load_best_model_at_end=True,
        early_stopping_steps=2,
        metric_for_best_model=metric,
        reward_funcs=scripted,
        max_steps=8,
    )
    run_exp(arguments)
    output_dir = Path(arguments["output_dir"])
    assert [line["eval_reward"] for line in eval_log(output_dir)] == SCRIPT[:4]
    assert [line["current_steps"] for line in trainer_log(output_dir) if "loss" in line] == [1, 2, 3, 4]

    saved = sorted(path.name for path in output_dir.glob("checkpoint-*"))
    assert saved == [f"checkpoint-{step}" for step in ((1, 2) if save_strategy == "best" else (1, 2, 3, 4))]
    final = load_file(output_dir / "adapter_model.safetensors")
    weights = {name: load_file(output_dir / name / "adapter_model.safetensors") for name in saved}
    same = [name for name in saved if all(torch.equal(weights[name][key], final[key]) for key in final)]
    assert same == ["checkpoint-2"]
    state = json.loads((output_dir / "trainer_state.json").read_text())
    assert state["best_global_step"] == 2
    assert state["best_metric"] == 1.0
    results = json.loads((output_dir / "eval_results.json").read_text())
    assert results["eval_reward"] == SCRIPT[4], "the model that was kept is evaluated at last"


def test_an_evaluation_that_no_function_applies_to_says_so(recipe, run_exp, tmp_path, caplog):
    (tmp_path / "small.py").write_text(
        "def small(prompts):\n    return [None if '1000' in prompt else i % 2 for i, prompt in enumerate(prompts)]\n"
    )
    run_exp(recipe(eval_dataset="thousand", eval_on_start=True, reward_funcs=f"{tmp_path}/small.py:small"))
    assert "No reward function applied to any completion of the 1 evaluation prompts" in caplog.text


@pytest.mark.parametrize("rollout_backend", ["hf", "vllm"])
def test_training_does_not_notice_evaluation(recipe, run_exp, tmp_path, rollout_backend):
    """Same tokens, same losses, same weights, same optimizer, and the generators where they would have been."""
    settings = {
        "rollout_backend": rollout_backend,
        "num_iterations": 2,
        "beta": 0.05,
        "log_completions": True,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 4,
        "learning_rate": 1e-2,
    }
    plain = recipe(output_dir=str(tmp_path / "plain"), **settings)
    run_exp(plain)
    evaluated = recipe(
        output_dir=str(tmp_path / "evaluated"),
        **settings,
        **EVERY_STEP,
        eval_on_start=True,
        eval_num_generations=3,
        eval_temperature=0.5,
    )
    run_exp(evaluated)
    evaluations = [line["eval_reward"] for line in eval_log(evaluated["output_dir"])]
    assert len(evaluations) == 1 + 4
    assert len(set(evaluations)) > 1, "the policy moves, and evaluations see it"
    assert eval_log(plain["output_dir"]) == []

    assert completions(evaluated["output_dir"]) == completions(plain["output_dir"])
    timed = ("time", "per_second", "loss/scale", "memory/", "tflops", "mfu")
    lines = [
        [
            {key: value for key, value in line.items() if not any(part in key for part in timed)}
            for line in trainer_log(run["output_dir"])
            if "loss" in line
        ]
        for run in (plain, evaluated)
    ]
    assert len(lines[0]) == 4
    assert lines[0] == lines[1]
    folders = [tmp_path / name / "checkpoint-4" for name in ("plain", "evaluated")]
    for name in ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt"):
        first, second = ((load_file if "safetensors" in name else load_state)(folder / name) for folder in folders)
        assert is_equal(first, second), name


def load_state(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def is_equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(is_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)
