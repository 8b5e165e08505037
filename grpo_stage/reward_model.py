"""Scores from a reward model that the host's `stage: rm` trained.

A score is what the model's value head says of the last token of prompt and completion, on the very tokens that the
policy read and sampled. Three kinds of it (`reward_model_type`): a model of its own, an adapter on the policy's base,
and one behind the host's reward server.

    B completions in a batch    L tokens of prompt and completion, right-padded as `stage: rm` pads    H hidden size
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from .policy import takes_logits_to_keep
from .rewards import REWARD_MODEL, RewardError
from .types import RolloutGroup


T = TypeVar("T")
Tokens = tuple[int, ...]

PLAIN_LORA = {"peft_type": "LORA", "bias": "none"}
"""What adapter_config.json may say under the keys of `LORA_EXTRAS`."""
LORA_EXTRAS = (
    *("peft_type", "bias", "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters"),
    *("rank_pattern", "alpha_pattern", "layer_replication", "alora_invocation_tokens", "use_qalora"),
)
"""Keys of adapter_config.json that make more of an adapter than a LoRA of one rank."""


class ModelReward:
    """The reward `reward_model`, scored by `score` in batches of like length under a token budget."""

    name = REWARD_MODEL

    def __init__(self, score: Callable[[Sequence[Tokens]], Sequence[float]], max_tokens: int) -> None:
        """
        Args:
            score: a number for each sequence of prompt and completion tokens.
            max_tokens: how many tokens, padding included, one call of `score` gets. A single longer one goes alone.
        """
        self._score = score
        self._max_tokens = max_tokens

    def __call__(self, groups: Sequence[RolloutGroup]) -> list[list[float | None]]:
        rows = [(group.prompt, completion) for group in groups for completion in group.completions]
        tokens = [prompt.token_ids + completion.token_ids for prompt, completion in rows]
        scores = [math.nan] * len(rows)
        for chosen in _chunks(list(map(len, tokens)), self._max_tokens):
            try:
                values = self._score([tokens[row] for row in chosen])
            except RewardServerError as error:
                raise self._error(str(error), *rows[chosen[0]]) from error
            for row, value in zip(chosen, values, strict=True):
                scores[row] = value
        for row, score in enumerate(scores):
            if not math.isfinite(score):
                raise self._error(f"gave {score}: a score is finite", *rows[row])
        flat = iter(scores)
        return [[next(flat) for _ in group.completions] for group in groups]

    def _error(self, problem: str, prompt: Any, completion: Any) -> RewardError:
        return RewardError(self.name, problem, prompt=prompt.text, completion=completion.text)


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
        self._weight, self._bias = (head[f"v_head.summary.{name}"].detach().float() for name in ("weight", "bias"))
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
        self._layers = []
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
            device = module.weight.device
            self._layers.append((module, down.to(device), up.to(device)))

    @contextmanager
    def activate(self) -> Iterator[nn.Module]:
        """Yield the policy as the reward model's backbone."""
        policy = self._policy
        requires_grad = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
        hooks = []
        try:
            with policy.disable_adapter():
                for module, down, up in self._layers:
                    hooks.append(module.register_forward_hook(partial(_add_lora, down, up, self._scale)))
                yield policy
        finally:
            for hook in hooks:
                hook.remove()
            for parameter, required in requires_grad:  # PEFT switches those of the adapter off and on
                parameter.requires_grad_(required)


class RewardServerError(RuntimeError):
    """The reward server did not answer with a score for each text."""


class ServerScorer:
    """Scores by the host's reward server, which is sent text with its special tokens."""

    def __init__(
        self, url: str, post: Callable[[str, list[str]], torch.Tensor], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """
        Args:
            url: `reward_model`.
            post: the host's request.
            tokenizer: the policy's.
        """
        self._url = url
        self._post = post
        self._tokenizer = tokenizer

    def __call__(self, sequences: Sequence[Tokens]) -> list[float]:
        texts = self._tokenizer.batch_decode([list(each) for each in sequences], skip_special_tokens=False)
        try:
            scores = self._post(self._url, texts).flatten().tolist()
        except (OSError, ValueError, LookupError, TypeError) as error:  # no connection, no JSON, no scores, no numbers
            raise RewardServerError(
                f"{self._url} did not answer with scores ({type(error).__name__}: {error})"
            ) from error
        if len(scores) != len(texts):
            raise RewardServerError(f"{self._url} answered with {len(scores)} scores for {len(texts)} texts")
        return scores

    def check(self) -> None:
        """Ask for one score.

        Raises:
            ValueError: if there is none.
        """
        try:
            self([(self._tokenizer.eos_token_id,)])
        except RewardServerError as error:
            raise ValueError(
                f"`reward_model: {self._url}` with `reward_model_type: api` is no reward server that answers: "
                f"{error}. Start one with `llamafactory-cli api` and `stage: rm`, and give the whole address, for "
                "example `http://localhost:8000/v1/score/evaluation`."
            ) from error


def refuse_extras(config: Mapping[str, Any], path: str) -> None:
    """Raise ValueError where an adapter_config.json is more than a plain LoRA."""
    extras = [key for key in LORA_EXTRAS if config.get(key) and config[key] != PLAIN_LORA.get(key)]
    if str(config.get("init_lora_weights")).startswith(("pissa", "olora", "corda", "loftq")):  # they change the base
        extras.append("init_lora_weights")
    if extras:
        listed = ", ".join(f"`{key}: {config[key]}`" for key in extras)
        raise ValueError(
            f"`reward_model: {path}` is not possible with `reward_model_type: lora`: its adapter_config.json has "
            f"{listed}, and only a plain LoRA can be put on the policy's base. Write `reward_model_type: full` with "
            "the reward model's base as `reward_model` and this adapter as `reward_model_adapters`."
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


def _chunks(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Rows of like length together, longest first, at most `max_tokens` of them with padding."""
    chunk: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True):
        if chunk and lengths[chunk[0]] * (len(chunk) + 1) > max_tokens:
            yield chunk
            chunk = []
        chunk.append(row)
    if chunk:
        yield chunk
