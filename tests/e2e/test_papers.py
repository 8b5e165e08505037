"""The recipes of papers: each as it is, but for the model, the data, the sizes and the engine."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_stage import workflow
from grpo_stage.algorithm.catalog import canonical
from grpo_stage.trainer import GRPOTrainer

from .conftest import trainer_log


PAPERS = Path(__file__).resolve().parents[2] / "yaml_examples" / "papers"
# What the test changes; all else is the paper's, and must reach the run as it stands in the recipe.
REPLACED = (
    *("model_name_or_path", "template", "dataset", "dataset_dir", "cutoff_len", "max_new_tokens", "output_dir"),
    *("rollout_backend", "vllm_gpu_util", "preprocessing_num_workers", "overwrite_cache", "bf16", "reward_kwargs"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type"),
    *("warmup_steps", "lora_rank", "save_steps", "plot_loss", "num_train_epochs"),
)


def test_there_is_one_for_each_paper_of_the_index() -> None:
    index = (PAPERS.parents[1] / "docs" / "algorithm.md").read_text(encoding="utf-8")
    listed = re.findall(r"`yaml_examples/papers/(\w+\.yaml)`", index)
    assert sorted(listed) == sorted(path.name for path in PAPERS.glob("*.yaml"))
    assert len(listed) == 10


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an eighth of its tokens ending a completion: DAPO learns from those that end."""
    folder = shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("ending") / "model")
    config = json.loads((folder / "generation_config.json").read_text())
    ends = [config["eos_token_id"], *range(1000, 1250)]
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": ends}))
    return folder


@pytest.mark.parametrize("path", sorted(PAPERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_two_steps(recipe, run_exp, toy_reward, model_dir, path, monkeypatch):
    recipe_of_paper = yaml.safe_load(path.read_text(encoding="utf-8"))
    papers = {key: value for key, value in recipe_of_paper.items() if key not in REPLACED}
    # The tiny model is never right: a reward that tells its completions apart stands in for the first.
    papers["reward_funcs"] = [toy_reward, *papers["reward_funcs"].split(",")[1:]]
    arguments = recipe(model_name_or_path=str(model_dir), save_strategy="steps", save_steps=2, **papers)
    used = watch_arguments(monkeypatch)
    run_exp(arguments)
    lines = [line for line in trainer_log(arguments["output_dir"]) if "loss" in line]
    assert len(lines) == 2
    assert all(line["skipped_steps"] == 0 and line["grad_norm"] > 0 for line in lines)
    state = json.loads((Path(arguments["output_dir"]) / "checkpoint-2" / "grpo_state.json").read_text())
    written = papers | {"lora_target": ["all"], "report_to": []}  # as the host holds them
    if "reward_weights" in papers:
        written["reward_weights"] = [float(weight) for weight in papers["reward_weights"].split(",")]
    for key, value in written.items():
        assert state["recipe"].get(key, value) == value, key
    for key, value in (written | canonical(papers)).items():
        assert (state["recipe"] | used)[key] == value, key


def watch_arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Fills with the arguments that the trainer is given."""
    used: dict[str, Any] = {}

    class Watched(GRPOTrainer):
        def __init__(self, **kwargs: Any) -> None:
            used.update(vars(kwargs["args"]) | vars(kwargs["grpo_args"]) | dataclasses.asdict(kwargs["sampling"]))
            super().__init__(**kwargs)

    monkeypatch.setattr(workflow, "GRPOTrainer", Watched)
    return used
