"""The recipes of papers: each as it is, but for the model, the data, the sizes and the engine."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from .conftest import trainer_log


PAPERS = Path(__file__).resolve().parents[2] / "yaml_examples" / "papers"
# What is the paper's, and must reach the run as it stands in the recipe.
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
    ends = [config["eos_token_id"], *range(1000, 7000)]
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": ends}))
    return folder


@pytest.mark.parametrize("path", sorted(PAPERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_two_steps(recipe, run_exp, toy_reward, model_dir, path):
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    papers = {key: value for key, value in written.items() if key not in REPLACED}
    # The tiny model is never right: a reward that tells its completions apart stands in for the first.
    papers["reward_funcs"] = [toy_reward, *papers["reward_funcs"].split(",")[1:]]
    arguments = recipe(model_name_or_path=str(model_dir), save_strategy="steps", save_steps=2, **papers)
    run_exp(arguments)
    lines = [line for line in trainer_log(arguments["output_dir"]) if "loss" in line]
    assert len(lines) == 2
    assert all(line["skipped_steps"] == 0 and line["grad_norm"] > 0 for line in lines)
    state = json.loads((Path(arguments["output_dir"]) / "checkpoint-2" / "grpo_state.json").read_text())
    own = {key: state["recipe"][key] for key in papers if key in state["recipe"]}
    objective = {"loss_type", "advantage_estimator", "beta"} & papers.keys()
    assert objective <= own.keys()
    assert all(own[key] == papers[key] for key in objective)
