"""The images of a run's prompts as its model takes them: by the host's `mm_plugin` and the model's processor."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from llamafactory.extras.constants import IMAGE_PLACEHOLDER
from PIL import Image
from transformers import PreTrainedTokenizerBase

from grpo_stage.algorithm.conditions import Rule, refuse_broken
from grpo_stage.host import facade
from grpo_stage.host.distribution import REPLICATED, distribution
from grpo_stage.host.model_files import skeleton
from grpo_stage.host.run_arguments import RunArguments
from grpo_stage.types import Prompt


KEPT_BYTES = 2**30
"""Of pixels that are made once for several passes over a prompt."""
_SIZES = ((64, 48), (150, 260))
"""Of two images that show whether a family's inputs can be made image by image: every family resizes one of them."""


def image_reader(
    arguments: RunArguments,
    template: Any,
    tokenizer: PreTrainedTokenizerBase,
    processor: Any,
    prompts: Sequence[Prompt],
    has_tools: bool = False,
) -> "HostImages | None":
    """What reads the images of a run's prompts; None if none has any.

    Raises:
        ValueError: for a model or an option that images are not possible with.
    """
    if not any(prompt.images for prompt in prompts):
        return None
    _refuse_options(arguments, has_tools)
    model = _Model.of(arguments)
    encoder = _Encoder(template, tokenizer, processor)
    takes_token_types = _check_family(arguments, encoder, model.placeholder)
    return HostImages(encoder, model, max(len(prompt.images) for prompt in prompts), takes_token_types)


@dataclass(frozen=True)
class _Encoder:
    template: Any
    tokenizer: Any
    processor: Any

    def token_ids(self, messages: Sequence[Any], images: Sequence[Any], is_expanded: bool = True) -> list[int]:
        """As the host's template encodes a conversation: with all tokens of each image, or with one."""
        plugin = self.template.mm_plugin
        before, plugin.expand_mm_tokens = plugin.expand_mm_tokens, is_expanded
        try:
            has_system = messages[0]["role"] == "system"
            system = messages[0]["content"] if has_system else ""
            turns = [*map(dict, messages[has_system:]), {"role": "assistant", "content": ""}]
            turns = plugin.process_messages(turns, list(images), [], [], self.processor)
            token_ids, _ = self.template.encode_oneturn(self.tokenizer, turns, system, "")
        finally:
            plugin.expand_mm_tokens = before
        return list(token_ids)

    def inputs(self, images: Sequence[Sequence[Any]], token_ids: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The model's arguments for prompts with these images and tokens."""
        none = [0] * len(images)
        return dict(
            self.template.mm_plugin.get_mm_inputs(
                [image for of_prompt in images for image in of_prompt], [], [],
                list(map(len, images)), none, none, [list(ids) for ids in token_ids], self.processor,
            )
        )  # fmt: skip


@dataclass(frozen=True)
class _Model:
    """What the config of a vision-language model tells."""

    placeholder: int
    rope_index: Callable[..., tuple[torch.Tensor, Any]] | None
    """Positions in three dimensions; None for a model that counts in one."""

    @classmethod
    def of(cls, arguments: RunArguments) -> "_Model":
        config = facade.load_config(arguments.model)
        name = f"`model_name_or_path: {arguments.model.model_name_or_path}`"
        placeholder = getattr(config, "image_token_id", None)
        if placeholder is None:
            raise ValueError(
                f"The dataset has images, and {name} takes none: its config.json names no token that stands for them "
                "(`image_token_id`). Name a vision-language model, or leave `images` out of the `columns` of the "
                "dataset in dataset_info.json if the text alone makes sense."
            )
        model: Any = skeleton(config)
        owner = next(
            (each for each in (model, getattr(model, "model", None)) if hasattr(each, "get_rope_index")), None
        )
        if model is None or (owner is None and hasattr(model.base_model, "rope_deltas")):
            raise ValueError(
                f"The dataset has images, and how {name} takes them is not known: transformers has no class for its "
                f"`model_type: {config.model_type}` that says so. Name a vision-language model that it has one for."
            )
        return cls(placeholder, None if owner is None else owner.get_rope_index)

    def positions(self, prompt: Prompt, arguments: dict[str, torch.Tensor]) -> torch.Tensor:
        """[K, prompt tokens] of a prompt with images, whose arguments are these."""
        if self.rope_index is None:
            return torch.arange(len(prompt.token_ids)).unsqueeze(0)
        input_ids = torch.tensor([prompt.token_ids])
        known = inspect.signature(self.rope_index).parameters
        given: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "mm_token_type_ids": (input_ids == self.placeholder).int(),
            **arguments,
        }
        return self.rope_index(**{name: value for name, value in given.items() if name in known})[0][:, 0]


class HostImages:
    """`ImageReader` on the host's plugin. Made by `image_reader`."""

    def __init__(self, encoder: _Encoder, model: _Model, num_images: int, takes_token_types: bool) -> None:
        self.placeholder = model.placeholder
        self.num_images = num_images
        self._encoder = encoder
        self._model = model
        self._takes_token_types = takes_token_types
        self._kept: OrderedDict[Any, _Inputs] = OrderedDict()
        self._kept_bytes = 0

    def arguments(self, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        each = [self._of_prompt(prompt).arguments for prompt in prompts if prompt.images]
        return {name: torch.cat([own[name] for own in each]) for name in (each[0] if each else ())}

    def positions(self, prompt: Prompt) -> torch.Tensor:
        if prompt.images:
            return self._of_prompt(prompt).positions
        return torch.arange(len(prompt.token_ids)).expand(1 if self._model.rope_index is None else 3, -1)

    def token_types(self, prompt: Prompt) -> torch.Tensor | None:
        return (torch.tensor(prompt.token_ids) == self.placeholder).long() if self._takes_token_types else None

    def compact(self, prompt: Prompt) -> tuple[list[int], list[Any]]:
        encoder, images = self._encoder, _contents(prompt)
        if not images:
            return list(prompt.token_ids), []
        processor = encoder.processor
        regular = encoder.template.mm_plugin._regularize_images(
            images, image_max_pixels=processor.image_max_pixels, image_min_pixels=processor.image_min_pixels
        )
        return encoder.token_ids(prompt.messages, images, is_expanded=False), regular["images"]

    def _of_prompt(self, prompt: Prompt) -> "_Inputs":
        key = prompt.identity
        if key not in self._kept:
            arguments = self._encoder.inputs([_contents(prompt)], [prompt.token_ids])
            arguments.pop("token_type_ids", None)
            self._kept[key] = _Inputs(arguments, self._model.positions(prompt, arguments))
            self._kept_bytes += self._kept[key].num_bytes
        self._kept.move_to_end(key)
        found = self._kept[key]
        while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
            self._kept_bytes -= self._kept.popitem(last=False)[1].num_bytes
        return found


@dataclass(frozen=True)
class _Inputs:
    """Of one prompt with images."""

    arguments: dict[str, torch.Tensor]
    positions: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return sum(each.numel() * each.element_size() for each in (*self.arguments.values(), self.positions))


def _contents(prompt: Prompt) -> list[Any]:
    """Of a prompt's images, as the host's plugin takes them."""
    return [image.path if image.data is None else image.data for image in prompt.images]


def _check_family(arguments: RunArguments, encoder: _Encoder, placeholder: int) -> bool:
    """Whether the model has to be told which tokens are of images.

    Raises:
        ValueError: if its inputs for two prompts are not those of each, one after the other.
    """
    name = f"`model_name_or_path: {arguments.model.model_name_or_path}`"
    images = [[Image.new("RGB", size, (90, 160, 30))] for size in _SIZES]
    token_ids = [encoder.token_ids([{"role": "user", "content": f"{IMAGE_PLACEHOLDER}?"}], own) for own in images]
    if not all(placeholder in ids for ids in token_ids):
        raise ValueError(
            f"`template: {arguments.data.template}` does not fit {name}: the prompt of an image has none of the "
            f"tokens that stand for one there ({encoder.tokenizer.convert_ids_to_tokens(placeholder)!r}). Write the "
            "template that the model was trained with."
        )
    together = encoder.inputs(images, token_ids)
    apart = [encoder.inputs([own], [ids]) for own, ids in zip(images, token_ids, strict=True)]
    types = [each.pop("token_type_ids", None) for each in (together, *apart)]
    expected = [[int(token == placeholder) for token in ids] for ids in token_ids]
    problem = None
    if types[0] is not None and [list(each) for each in types[0]] != expected:
        problem = "it tells images from text in another way (`token_type_ids`)"
    for key, whole in together.items():
        parts: list[Any] = [each.get(key) for each in apart]
        if not all(isinstance(each, torch.Tensor) for each in (whole, *parts)):
            problem = f"its `{key}` is no tensor"
        elif any(part.shape[1:] != whole.shape[1:] for part in parts):
            problem = f"its `{key}` of an image depends on the other images of a batch"
        elif "token_type" in key or not torch.equal(torch.cat(parts), whole):
            problem = f"its `{key}` is made for a batch, and not image by image"
    if problem is not None:
        raise ValueError(
            f"The dataset has images, and those of {name} are not possible in `stage: grpo`: {problem}, and batches "
            "are put together from prompts that are read once. Models of the families of docs/images.md are possible."
        )
    return types[0] is not None


def _refuse_options(arguments: RunArguments, has_tools: bool) -> None:
    values = arguments.values()
    other = values.ref_model
    refuse_broken(
        _RULES,
        SimpleNamespace(
            **vars(values),
            has_tools=has_tools,
            distribution=distribution(values.deepspeed),
            model_type=facade.load_config(arguments.model).model_type,
            ref_model_type=other and facade.load_config(facade.arguments_for(arguments.model, other)).model_type,
        ),
    )


def _rule(broken: Callable[[SimpleNamespace], bool], what: str, reason: str, remedy: str) -> Rule:
    return Rule(broken, f"{what} is not possible with a dataset that has images: {reason}. {remedy}.")


_LEAVE_OUT = "Leave it out, or `images` out of the `columns` of the dataset in dataset_info.json"
_RULES: Iterable[Rule] = (
    _rule(lambda v: v.has_tools, "`tools` or `environment`", "their turns were not verified with images", _LEAVE_OUT),
    _rule(
        lambda v: v.rollout_backend == "vllm_server",
        "`rollout_backend: vllm_server`",
        "images do not go over its connection yet",
        "Write `rollout_backend: vllm`, or `hf`, which samples with the trained model itself",
    ),
    _rule(
        lambda v: (
            v.rollout_backend == "vllm"
            and v.finetuning_type == "lora"
            and v.vllm_lora == "native"
            and not (v.freeze_vision_tower and v.freeze_multi_modal_projector)
        ),
        "`finetuning_type: lora` with `freeze_vision_tower: {freeze_vision_tower}`, `freeze_multi_modal_projector: "
        "{freeze_multi_modal_projector}` and `rollout_backend: vllm`",
        "vLLM serves adapters on the language part alone",
        "Leave the two keys at true, or write `vllm_lora: merged`, which gives vLLM the weights with the adapter in "
        "them",
    ),
    _rule(
        lambda v: v.rollout_ahead,
        "`rollout_ahead: {rollout_ahead}`",
        "images do not go to the process of its engine yet",
        "Leave it out",
    ),
    _rule(
        lambda v: v.structured_outputs is not None,
        "`structured_outputs`",
        "what is sampled under it is scored again, which was not verified with images",
        "Leave it out",
    ),
    _rule(
        lambda v: v.reward_model is not None,
        "`reward_model: {reward_model}`",
        "a reward model is asked about text alone, and would judge answers without what they are about",
        "Name other `reward_funcs`; a function of yours gets the paths of the images as the column that holds them",
    ),
    _rule(
        lambda v: v.ref_model is not None and v.ref_model_type != v.model_type,
        "`ref_model: {ref_model}`",
        "its `model_type` is {ref_model_type} and that of the model {model_type}, so that it takes other pixels",
        "Leave it out for the policy before the first step, or name a model of the same family",
    ),
    _rule(
        lambda v: v.distribution != REPLICATED,
        "{distribution}",
        "a process without an image in its batch would not join the others in what reads images",
        "Launch without it: several processes then hold all weights each (DDP)",
    ),
)
