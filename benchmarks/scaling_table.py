"""The table of layouts in docs/scaling.md: `scaling_table.py [NAME ...]`, names of recipes of yaml_examples/scaling.

Plans each recipe on the layout that its first lines name, with a model folder that holds nothing but the published
config.json in the place of the hub's. Completions are spread evenly up to `max_new_tokens`; an epoch is GSM8K's 7,473
questions. Takes minutes: the model's code is traced as shapes.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import yaml
from scaling_check import SHAPES
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_stage.layout.syntax import parse_layout
from grpo_stage.tools.plan_layout import LayoutPlan, plan_layout
from grpo_stage.tools.recipe_file import errors_explained, quiet_host


RECIPES = Path(__file__).resolve().parents[1] / "yaml_examples" / "scaling"
NUM_PROMPTS = 7473
GIB = 2.0**30


def model_folder(name: str, parent: Path) -> Path:
    """A folder with the config of a model of `SHAPES`."""
    folder = parent / name
    shape = dict(SHAPES[name])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape, max_position_embeddings=32768, dtype="bfloat16")
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.save_pretrained(folder)
    return folder


def shape_of(hub_name: str) -> str:
    """The name in `SHAPES` of a model of the hub."""
    return hub_name.rpartition("/")[2].removesuffix("-Instruct")


def row(name: str, plan: LayoutPlan) -> str:
    memory, outcome = plan.memory, plan.outcome
    rank = f"{memory.grpo.peak.total / GIB:.0f} ({memory.grpo.peak.name})"
    server = f"{plan.server['weights'] / GIB:.0f} + {plan.server['KV cache'] / GIB:.0f}" if plan.server else ""
    if outcome is None:
        return f"| {name} | {rank} | {server} | {plan.problem} | | | | | | |"
    delivered = plan.memory.cost.delivered / 1e9
    idle = ", ".join(f"{100 * share:.0f} %" for share in outcome.idle.values())
    return (
        f"| {name} | {rank}{'' if plan.fits else ', **too much**'} | {server} | {outcome.rollout:.3g} "
        f"| {outcome.update:.3g} | {delivered:.3g} GB, {outcome.sync:.2g} | {outcome.step:.3g} "
        f"| {outcome.num_tokens / 1e3:,.0f}k, {outcome.tokens_per_s:,.0f} | {idle} | {plan.hours:.3g} |"
    )


def main(names: list[str]) -> None:
    print(
        "| recipe | rank, GiB | server, GiB | rollout, s | update, s | sync, s | step, s | tokens | idle | epoch, h |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    os.chdir(RECIPES.parents[1])
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(RECIPES.glob("*.yaml")):
            if names and path.stem not in names:
                continue
            text = path.read_text(encoding="utf-8")
            found = re.search(r'--layout "(.*)"', text)
            assert found is not None, f"{path} names no layout"
            recipe = yaml.safe_load(text)
            recipe["model_name_or_path"] = str(model_folder(shape_of(recipe["model_name_or_path"]), Path(folder)))
            with quiet_host(), errors_explained(recipe):
                plan = plan_layout(recipe, parse_layout(found[1]), num_prompts=NUM_PROMPTS)
            print(row(path.stem, plan), flush=True)
            print(f"  {dict(plan.memory.grpo.peak.parts)} {plan.memory.problems} {plan.memory.notes}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
