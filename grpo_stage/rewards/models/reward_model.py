"""Scores from a reward model that the host's `stage: rm` trained.

A score is what the model's value head says of the last token of prompt and completion, on the very tokens that the
policy read and sampled. Where a completion ended, that is the last token that the template closes an answer with: no
other one did `stage: rm` train the head on. Three kinds of it (`reward_model_type`): a model of its own, an adapter on
the policy's base, and one behind the host's reward server (`reward_server.py`).

    B completions in a batch    L tokens of prompt and completion, right-padded as `stage: rm` pads    H hidden size
"""

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from traceback import format_exc
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from peft import LoraConfig, PeftModel
from torch import nn
from torch.nn import functional

from grpo_stage.rewards.errors import RewardError
from grpo_stage.rewards.models.server import RewardServerError
from grpo_stage.rewards.suite import REWARD_MODEL
from grpo_stage.rollout.engines.lora import lora_extras
from grpo_stage.types import Completion, FinishReason, Prompt, RolloutGroup
from grpo_stage.update.logprobs import takes_logits_to_keep


logger = logging.getLogger(f"llamafactory.{__name__}")  # seen wherever the host's messages are

Tokens = tuple[int, ...]

HEAD_WEIGHT, HEAD_BIAS = "v_head.summary.weight", "v_head.summary.bias"
_NO_MEMORY = (
    "ran out of memory with a single completion of {} tokens, prompt included: there is nothing left to split. Lower "
    "`max_new_tokens` or `cutoff_len`, give vLLM less (`vllm_gpu_util`, `vllm_sleep`), or load less of a model "
    "(`reward_model_quantization_bit`, or `reward_model_type: api` on another device)"
)


class ModelReward:
    """The reward `reward_model`, scored by `score` in batches of like length under a token budget."""

    name = REWARD_MODEL

    def __init__(self, score: Callable[[Sequence[Tokens]], Sequence[float]], max_tokens: int, ending: Tokens) -> None:
        """
        Args:
            score: a number for each sequence of prompt and completion tokens.
            max_tokens: how many tokens, padding included, one call of `score` gets. A single longer one goes alone.
                It gives way where memory runs out.
            ending: the tokens that the template closes an answer with.
        """
        self._score = score
        self._max_tokens = max_tokens
        self._ending = ending

    def __call__(self, groups: Sequence[RolloutGroup]) -> list[list[float | None]]:
        """[P][G]

        Raises:
            RewardError: if there is no finite score for a completion.
        """
        rows = [(group.prompt, completion) for group in groups for completion in group.completions]
        tokens = [prompt.token_ids + self._closed(completion) for prompt, completion in rows]
        scores = [math.nan] * len(rows)
        waiting = sorted(range(len(rows)), key=lambda row: len(tokens[row]), reverse=True)
        while waiting:
            length = len(tokens[waiting[0]])
            chosen = waiting[: max(1, self._max_tokens // length)]
            try:
                values = self._score([tokens[row] for row in chosen])
            except RewardServerError as error:
                raise self._error(str(error), *rows[chosen[0]]) from error
            except Exception as error:  # whatever a model's forward pass raises: the run ends with a checkpoint
                if not should_reduce_batch_size(error):
                    problem = f"raised {type(error).__name__} in a batch of {len(chosen)} completions"
                    raise self._error(problem, *rows[chosen[0]], format_exc()) from error
                memory_error = error.with_traceback(None)  # its frames hold tensors
            else:
                for row, value in zip(chosen, values, strict=True):
                    scores[row] = value
                waiting = waiting[len(chosen) :]
                continue
            if len(chosen) == 1:
                raise self._error(_NO_MEMORY.format(length), *rows[chosen[0]]) from memory_error
            self._halve_token_budget(len(chosen) * length)
        for row, score in enumerate(scores):
            if not math.isfinite(score):
                raise self._error(f"gave {score}: a score is finite", *rows[row])
        flat = iter(scores)
        return [[next(flat) for _ in group.completions] for group in groups]

    def _closed(self, completion: Completion) -> Tokens:
        """Its tokens as the template would close them, whichever end token was sampled; as they are if none was."""
        if completion.finish_reason is not FinishReason.STOP:
            return completion.token_ids
        content = completion.token_ids[:-1]
        # Some templates close an answer with more than the end token, which the policy samples as well: `\n<eos>`.
        sampled = max(n for n in range(len(self._ending) + 1) if content[len(content) - n :] == self._ending[:n])
        return content + self._ending[sampled:]

    def _halve_token_budget(self, num_tokens: int) -> None:
        budget, self._max_tokens = self._max_tokens, num_tokens // 2
        clear_device_cache(garbage_collection=True)
        logger.warning(
            f"Out of memory in a pass of the reward model: it is done again with batches of {self._max_tokens} tokens "
            f"instead of {budget}, which changes nothing but the speed."
        )

    def _error(self, problem: str, prompt: Prompt, completion: Completion, traceback: str = "") -> RewardError:
        return RewardError(self.name, problem, prompt=prompt.text, completion=completion.text, traceback=traceback)


class ValueHeadScorer:
    """Scores with a causal language model and a value head in this process."""

    def __init__(
        self,
        activate: Callable[[], AbstractContextManager[nn.Module]],
        head: Mapping[str, torch.Tensor],
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        """
        Args:
            activate: yields the model; what it changes for that is as before afterwards.
            head: `v_head.summary.weight` [1, H] and `v_head.summary.bias` [1], as the host keeps them.
            autocast: the precision of a forward pass.
        """
        self._activate = activate
        self._weight, self._bias = (head[key].detach().float() for key in (HEAD_WEIGHT, HEAD_BIAS))
        self._autocast = autocast

    @torch.no_grad()
    def __call__(self, sequences: Sequence[Tokens]) -> list[float]:
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        input_ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)  # [B, L]; masked where it is 0
        for row, sequence in enumerate(sequences):
            input_ids[row, : len(sequence)] = torch.tensor(sequence)
        attention_mask = torch.arange(input_ids.shape[1]) < lengths.unsqueeze(1)  # [B, L]
        with self._activate() as model, _evaluating(model), self._autocast():
            device = next(model.parameters()).device
            output = model(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.long().to(device),
                output_hidden_states=True,
                use_cache=False,
                **({"logits_to_keep": 1} if takes_logits_to_keep(model) else {}),
            )
            hidden = output.hidden_states[-1]  # [B, L, H]
            last = hidden[torch.arange(len(sequences)), lengths - 1].float()  # [B, H]
        weight, bias = self._weight.to(last.device), self._bias.to(last.device)
        return functional.linear(last, weight, bias).squeeze(-1).tolist()


class AdapterOnPolicy:
    """A reward model's LoRA adapter on the policy's base, beside PEFT and not within it.

    As another adapter of PEFT's it would stand in the policy's state, its saves and its optimizer, and would have to
    be switched. Here the policy's adapter is off while this one's share is added to what its layers return: the
    policy's weights are never touched.
    """

    def __init__(self, policy: PeftModel, config: LoraConfig, weights: Mapping[str, torch.Tensor], path: str) -> None:
        """
        Args:
            policy: stands on the base that the adapter was trained on.
            config: the adapter's.
            weights: `<module>.lora_A.weight` and `<module>.lora_B.weight`, as PEFT saves them.
            path: where it is from, for messages.

        Raises:
            ValueError: if it is not a plain LoRA, or does not fit the policy's base.
        """
        refuse_extras(config.to_dict(), path)
        self._policy = policy
        self._scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        self._layers: list[tuple[Any, torch.Tensor, torch.Tensor]] = []
        names = sorted({name.rpartition(".lora_")[0] for name in weights})
        modules: dict[str, Any] = dict(policy.named_modules())
        for name in names:
            down, up = (weights.get(f"{name}.lora_{part}.weight") for part in "AB")
            module = modules.get(name)
            shape = (getattr(module, "in_features", None), getattr(module, "out_features", None))
            if module is None or down is None or up is None or shape != (down.shape[1], up.shape[0]):
                raise ValueError(
                    f"`reward_model: {path}` does not fit the policy's base: its adapter changes {name}, which the "
                    f"base {'has in another shape' if module is not None else 'does not have'}. An adapter "
                    "(`reward_model_type: lora`) has to be trained on the very `model_name_or_path` of this run; "
                    "write `reward_model_type: full` with the reward model's own base as `reward_model` and this "
                    "adapter as `reward_model_adapters`."
                )
            self._layers.append((module, down, up))

    @contextmanager
    def activate(self) -> Iterator[nn.Module]:
        """Yield the policy as the reward model's backbone."""
        policy = self._policy
        requires_grad = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
        hooks = []
        try:
            # Not before: the policy may be placed on its device after this is made.
            self._layers = [
                (module, down.to(module.weight.device), up.to(module.weight.device))
                for module, down, up in self._layers
            ]
            with policy.disable_adapter():
                for module, down, up in self._layers:
                    hooks.append(module.register_forward_hook(partial(_add_lora, down, up, self._scale)))
                yield policy
        finally:
            for hook in hooks:
                hook.remove()
            for parameter, required in requires_grad:  # PEFT switches those of the adapter off and on
                parameter.requires_grad_(required)


def refuse_extras(config: Mapping[str, Any], path: str) -> None:
    """Raise ValueError where an adapter_config.json is more than a plain LoRA."""
    extras = list(lora_extras(config))
    if str(config.get("init_lora_weights")).startswith(("pissa", "olora", "corda", "loftq")):  # they change the base
        extras.append("init_lora_weights")
    if extras:
        listed = ", ".join(f"`{key}: {config[key]}`" for key in extras)
        raise ValueError(
            f"`reward_model: {path}` is not possible with `reward_model_type: lora`: its adapter_config.json has "
            f"{listed}, and only a plain LoRA can be put on the policy's base. Write `reward_model_type: full` with "
            "the reward model's base as `reward_model` and this adapter as `reward_model_adapters`."
        )


def refuse_other_base(base: str | None, path: str, own: str) -> None:
    """Raise ValueError unless an adapter (`reward_model_type: lora`) was trained on the policy's own base.

    Another model of the same shape would give scores as well, and nothing would show that they mean nothing.

    Args:
        base: `base_model_name_or_path` of its adapter_config.json.
        path: where it is from.
        own: `model_name_or_path`.
    """
    if not may_be_same_model(base, own):
        raise ValueError(
            f"`reward_model: {path}` with `reward_model_type: lora` stands on another model than the policy: its "
            f"adapter_config.json has `base_model_name_or_path: {base}`, and this run `model_name_or_path: {own}`, "
            f"on which its scores would mean nothing. Write `reward_model_type: full`, `reward_model: {base}` and "
            f"`reward_model_adapters: {path}`; or, if both are the same model in two places, write {own} into that "
            "adapter_config.json."
        )


def warn_of_other_base(base: str | None, path: str, own: str) -> None:
    """As `refuse_other_base`, of `reward_model_adapters` on a `reward_model` that the user chose for them."""
    if not may_be_same_model(base, own):
        logger.warning(
            f"`reward_model_adapters: {path}` was trained on {base} (`base_model_name_or_path` of its "
            f"adapter_config.json), and is put on `reward_model: {own}`: unless they are the same model in two "
            "places, its scores mean nothing."
        )


def may_be_same_model(base: str | None, path: str) -> bool:
    """Paths are compared resolved, and with that a hub's names as text. An adapter may not say what it stands on."""
    return not base or os.path.realpath(base) == os.path.realpath(path)


def refuse_head(head: Mapping[str, torch.Tensor] | None, key: str, path: str, hidden_size: int) -> None:
    """Raise ValueError unless `head` is a value head for a model of that hidden size.

    Args:
        head: what is in the file; None where there is none.
        key: the YAML key that names the folder.
        path: the folder.
        hidden_size: H.
    """
    if head is None:
        raise ValueError(
            f"`{key}: {path}` has no value head (value_head.safetensors or value_head.bin), so that it would score "
            "at random. Give the folder that LLaMA-Factory's `stage: rm` wrote; what it wrote with LoRA is an "
            "adapter, which `reward_model_type: full` takes as `reward_model_adapters`."
        )
    found = {name: list(tensor.shape) for name, tensor in head.items()}
    expected = {HEAD_WEIGHT: [1, hidden_size], HEAD_BIAS: [1]}
    if any(found.get(name) != shape for name, shape in expected.items()):
        raise ValueError(
            f"`{key}: {path}` has a value head that does not fit, so that it would score at random: its file holds "
            f"{found}, and {expected} is expected, as LLaMA-Factory's `stage: rm` writes it for this model. Give the "
            "folder that it wrote, with the base that it was trained on."
        )


def _add_lora(
    down: torch.Tensor,
    up: torch.Tensor,
    scale: float,
    module: nn.Module,
    inputs: tuple[Any, ...],
    output: torch.Tensor,
) -> torch.Tensor:
    hidden = functional.linear(inputs[0].to(down.dtype), down)
    return (output + functional.linear(hidden, up) * scale).to(output.dtype)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
