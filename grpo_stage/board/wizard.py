"""The first run in four questions: dataset, rewards, model and size make a recipe, which fills the form."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gradio as gr
from gradio.components import Component
from llamafactory.extras.misc import is_accelerator_available
from llamafactory.webui.common import DEFAULT_SAVE_DIR
from llamafactory.webui.control import list_datasets

from grpo_stage.host.generated_datasets import SUMS
from grpo_stage.host.known_models import config_here, template_of
from grpo_stage.host.learning_rates import LORA_ALPHA, start_rate
from grpo_stage.rewards.registry import BUILTIN_REWARDS


SIZES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "try": {
            **{"max_steps": 20, "per_device_train_batch_size": 4, "num_generations": 4},
            **{"max_new_tokens": 256, "save_steps": 10},
        },
        "small": {
            **{"max_steps": 200, "per_device_train_batch_size": 8, "num_generations": 8},
            **{"max_new_tokens": 512, "save_steps": 50},
        },
        "whole": {
            **{"num_train_epochs": 1.0, "per_device_train_batch_size": 16, "num_generations": 8},
            **{"max_new_tokens": 1024, "save_steps": 50},
        },
    }
)
CUTOFF_LEN = 1024
_TOKENS_ON_CPU = 64
"""A processor samples a hundred tokens a second or so, and one long completion keeps the whole step waiting."""
_WANT_TAGS = ("format", "tag_count")
_ASKS_FOR_TAGS = (
    "Think first, between <think> and </think>. Then give the final answer alone, between <answer> and </answer>."
)


def first_recipe(
    dataset: str | None, rewards: list[str], model: str, size: str, dataset_dir: str, template: str | None = None
) -> dict[str, Any]:
    """A recipe of LoRA for this machine. What is not answered is left out, and the check says what is missing."""
    has_gpu, model = is_accelerator_available(), model.strip()
    recipe = {
        **{"stage": "grpo", "do_train": True, "finetuning_type": "lora", "lora_target": "all"},
        "lora_alpha": LORA_ALPHA,
        **{"model_name_or_path": model or None, "template": template or template_of(model)},
        **{"dataset": dataset or None, "dataset_dir": dataset_dir},
        "reward_funcs": list(rewards) or None,
        "default_system": _ASKS_FOR_TAGS if set(rewards) & set(_WANT_TAGS) else None,
        "rollout_backend": "vllm" if find_spec("vllm") else "hf",
        **{"learning_rate": float(start_rate("lora", model)), "lr_scheduler_type": "constant_with_warmup"},
        **({"bf16": True} if has_gpu else {"use_cpu": True}),
        **{"logging_steps": 1, "log_completions": True, "report_to": "none"},
        **SIZES[size],
        **_room(model, SIZES[size]["max_new_tokens"] if has_gpu else _TOKENS_ON_CPU),
    }
    return {key: value for key, value in recipe.items() if value is not None}


def _room(model: str, max_new_tokens: int) -> dict[str, int]:
    """Tokens for prompts and completions, as far as the model is known to have positions for them."""
    positions = config_here(model).get("max_position_embeddings")
    if not isinstance(positions, int):
        return {"cutoff_len": CUTOFF_LEN, "max_new_tokens": max_new_tokens}
    completion = min(max_new_tokens, positions // 2)
    return {"cutoff_len": min(CUTOFF_LEN, positions - completion), "max_new_tokens": completion}


def datasets_to_choose(dataset_dir: str, stage_name: str) -> gr.Dropdown:
    """The list of the first question: the host's, and sums that need no file."""
    listed = list_datasets(dataset_dir, stage_name)
    return gr.Dropdown(choices=[SUMS, *listed.constructor_args["choices"]])


class Wizard:
    """The questions, in a group that is folded once there are runs."""

    def __init__(self) -> None:
        is_first = not Path(DEFAULT_SAVE_DIR).is_dir()
        with gr.Accordion(open=is_first, visible=False, elem_id="grpo_wizard", elem_classes="grpo") as self.block:
            with gr.Row():
                self.dataset = gr.Dropdown(
                    [SUMS], multiselect=True, allow_custom_value=True, elem_id="grpo_wizard_dataset"
                )
                self.rewards = gr.Dropdown(
                    list(BUILTIN_REWARDS),
                    value=["accuracy"],
                    multiselect=True,
                    allow_custom_value=True,
                    elem_id="grpo_wizard_rewards",
                )
                self.model = gr.Textbox(elem_id="grpo_wizard_model")
                self.size = gr.Dropdown(list(SIZES), value="try", elem_id="grpo_wizard_size")
            self.button = gr.Button(elem_id="grpo_wizard_btn")
        self.elements: dict[str, gr.blocks.Block] = {
            "grpo_wizard": self.block,
            "grpo_wizard_dataset": self.dataset,
            "grpo_wizard_rewards": self.rewards,
            "grpo_wizard_model": self.model,
            "grpo_wizard_size": self.size,
            "grpo_wizard_btn": self.button,
        }

    @property
    def questions(self) -> list[Component]:
        """The fields of the answers."""
        return [self.dataset, self.rewards, self.model, self.size]

    def recipe(
        self,
        data: Mapping[Component, Any],
        dataset_dir: str,
        datasets_chosen: list[str],
        model_chosen: str,
        template: str | None,
    ) -> dict[str, Any]:
        """The recipe that the answers make.

        Args:
            data: a page's values.
            dataset_dir: of the page.
            datasets_chosen: above the questions; they stand for an empty answer, and sums if there are none.
            model_chosen: as the datasets.
            template: that of the model above; None for the tokenizer's own.
        """
        datasets, rewards, model, size = (data[question] for question in self.questions)
        model = (model or "").strip() or model_chosen
        return first_recipe(
            ",".join(datasets or datasets_chosen or [SUMS]),
            rewards or [],
            model,
            size,
            dataset_dir,
            template if model == model_chosen else None,
        )
