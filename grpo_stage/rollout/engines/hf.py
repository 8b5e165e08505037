"""Rollouts with transformers' `generate`: slower than vLLM, everywhere, and the reference in tests."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

from grpo_stage.rollout.engines.decoding import completion_text
from grpo_stage.rollout.engines.seeds import sample_seed
from grpo_stage.types import Completion, FinishReason, ImageReader, Prompt, RolloutGroup, SamplingSettings
from grpo_stage.update.sharding import gathered


@dataclass(frozen=True, slots=True)
class _Row:
    prompt: Prompt
    seed: int


class HFEngine:
    """Samples from the live policy, so `sync` only notes which version that is.

    Where several processes hold the policy's weights together, each has all of them from `sync` to `sleep`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        autocast_dtype: torch.dtype | None = None,
        max_tokens_per_batch: int = 16384,
        images: ImageReader | None = None,
    ) -> None:
        """
        Args:
            tokenizer: decodes completions.
            autocast_dtype: the precision of the trainer's mixed-precision passes, so that both compute alike; None
                where it has none.
            max_tokens_per_batch: how many tokens, padding included, are in the KV cache at once. A single completion
                that is longer is sampled alone.
            images: reads those of prompts; None in a run without.
        """
        self.logprob_temperature = math.nan
        """Set by `generate`: log-probabilities are the policy's own at the sampling temperature, before any cut; at 1
        where that is 0."""
        self.on_step: Callable[[], None] = lambda: None
        self._tokenizer = tokenizer
        self._autocast_dtype = autocast_dtype
        self._max_tokens_per_batch = max_tokens_per_batch
        self._images = images
        self._policy: torch.nn.Module | None = None
        self._version = -1
        self._gathered = contextlib.ExitStack()

    def sync(self, policy: torch.nn.Module, version: int) -> None:
        self.sleep()
        self._gathered.enter_context(gathered(policy))
        self._policy, self._version = policy, version

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingSettings, step: int) -> list[RolloutGroup]:
        if self._policy is None:
            raise RuntimeError("generate() was called before sync(): there is no policy to sample from.")
        self.logprob_temperature = sampling.temperature or 1.0
        group_size = sampling.num_generations
        rows = [
            _Row(prompt, sample_seed(sampling.seed, step, prompt.index, sample))
            for prompt in prompts
            for sample in range(group_size)
        ]
        completions: list[Completion] = []
        with self._sampler(sampling.max_new_tokens, sampling.stop_token_ids) as model:
            for batch in _batches(rows, sampling.max_new_tokens, self._max_tokens_per_batch):
                completions += self._sample(model, batch, sampling)
        return [
            RolloutGroup(
                prompt=prompt,
                completions=tuple(completions[i * group_size : (i + 1) * group_size]),
                policy_version=self._version,
            )
            for i, prompt in enumerate(prompts)
        ]

    def score(self, groups: Sequence[RolloutGroup]) -> list[torch.Tensor]:
        """Token by token, as completions are sampled."""
        if self._policy is None:
            raise RuntimeError("score() was called before sync(): there is no policy to ask.")
        rows = [_Row(group.prompt, 0) for group in groups for _ in group.completions]
        completions = iter([completion.token_ids for group in groups for completion in group.completions])
        longest = max((len(each.token_ids) for group in groups for each in group.completions), default=1)
        scores = []
        with self._sampler(longest, ()) as model:
            for batch in _batches(rows, longest, self._max_tokens_per_batch):
                token_ids = [next(completions) for _ in batch]
                reader = _Reader(token_ids, longest, model.device)
                _generate(
                    model,
                    **self._start(model, batch),
                    logits_processor=LogitsProcessorList([reader]),
                    synced_gpus=False,
                )
                logprobs = torch.stack(reader.logprobs, dim=1).cpu()
                scores += [row[: len(tokens)] for row, tokens in zip(logprobs, token_ids, strict=True)]
        return scores

    def sleep(self) -> None:
        """The trainer's own model samples; it is let go of until the next `sync`, so that a new one can replace it."""
        self._policy = None
        self._gathered.close()

    def close(self) -> None:
        self.sleep()

    @contextlib.contextmanager
    def _sampler(self, max_new_tokens: int, stop_token_ids: Sequence[int]) -> Iterator[Any]:
        """The policy, ready to generate."""
        # LoRA layers live inside the base model, and PEFT's own `generate` would change its generation config.
        model: Any = self._policy.get_base_model() if isinstance(self._policy, PeftModel) else self._policy
        pad_token_id = self._tokenizer.pad_token_id
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=list(stop_token_ids) or None,
            # What follows a completion's end is cut by position, so any token may pad.
            pad_token_id=0 if pad_token_id is None else pad_token_id,
            do_sample=False,  # a logits processor leaves one token to choose from
            use_cache=True,
        )
        autocast = torch.autocast(model.device.type, self._autocast_dtype, enabled=self._autocast_dtype is not None)
        with _as_sampler(model, config), torch.no_grad(), autocast:
            yield model

    def _sample(self, model: Any, batch: Sequence[_Row], sampling: SamplingSettings) -> list[Completion]:
        start = self._start(model, batch)
        sampler = _Sampler([row.seed for row in batch], sampling, start["attention_mask"], self.on_step)
        output = _generate(
            model,
            **start,
            logits_processor=LogitsProcessorList([sampler]),
            synced_gpus=False,  # each process has the whole model, and its own number of tokens
        )
        sampled = output[:, start["input_ids"].shape[1] :].tolist()
        logprobs = torch.stack(sampler.logprobs, dim=1).tolist()
        return [self._completion(*row, sampling.stop_token_ids) for row in zip(sampled, logprobs, strict=True)]

    def _start(self, model: Any, batch: Sequence[_Row]) -> dict[str, Any]:
        """What `generate` begins with."""
        prompts = [row.prompt for row in batch]
        images = self._images if any(prompt.images for prompt in prompts) else None
        start: dict[str, Any] = {**_left_padded(prompts), **({} if images is None else _positions(prompts, images))}
        cache = _prefilled(model, prompts, images)
        if images is not None and cache is None:
            start |= images.arguments(prompts) | _token_types(prompts, images)
        return {name: each.to(model.device) for name, each in start.items()} | {"past_key_values": cache}

    def _completion(self, sampled: list[int], logprobs: list[float], stop_token_ids: tuple[int, ...]) -> Completion:
        end = next((i for i, token in enumerate(sampled) if token in stop_token_ids), None)
        length = len(sampled) if end is None else end + 1
        finish_reason = FinishReason.LENGTH if end is None else FinishReason.STOP
        return Completion(
            token_ids=tuple(sampled[:length]),
            sampling_logprobs=tuple(logprobs[:length]),
            finish_reason=finish_reason,
            text=completion_text(self._tokenizer, sampled[:length], finish_reason),
        )


class _Sampler(LogitsProcessor):
    """Draws each row's token with the row's own random numbers, and leaves it as the only one to choose.

    A token is drawn by inverting the distribution function, with one number that is even in [0, 1) a token; at
    temperature 0 it is the likeliest one. It is done here since `generate` itself draws a whole batch from the global
    generator, which makes a completion depend on its neighbors.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        sampling: SamplingSettings,
        prompt_mask: torch.Tensor,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.logprobs: list[torch.Tensor] = []
        """[B] for each step: the policy's own at the sampling temperature, before top-k, top-p, min-p and penalty."""
        rows = [
            torch.rand(sampling.max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        self._draws = torch.stack(rows).to(prompt_mask.device)  # [B, T]: drawn at once, and alike on every device
        self._is_greedy = sampling.temperature == 0
        self._temperature = float(sampling.temperature) or 1.0
        self._prompt_mask = prompt_mask
        self._on_step = on_step
        self._penalty = (
            None
            if sampling.repetition_penalty == 1.0
            else RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
        )
        self._warpers = LogitsProcessorList([TemperatureLogitsWarper(self._temperature)])
        if sampling.top_k > 0:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p > 0.0:
            self._warpers.append(MinPLogitsWarper(sampling.min_p))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._on_step()
        own = torch.log_softmax(scores / self._temperature, dim=-1)
        warped = scores if self._penalty is None else self._penalize(input_ids, scores)
        warped = self._warpers(input_ids, warped)
        tokens = warped.argmax(dim=-1, keepdim=True) if self._is_greedy else self._draw(warped)
        self.logprobs.append(own.gather(-1, tokens).squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens, 0.0)  # type: ignore[return-value]

    def _draw(self, logits: torch.Tensor) -> torch.Tensor:
        """[B, 1] tokens. In float64, so that the sum over a vocabulary does not round small shares away."""
        step = len(self.logprobs)
        cumulative = torch.softmax(logits, dim=-1).cumsum(dim=-1, dtype=torch.float64)
        drawn = self._draws[:, step : step + 1] * cumulative[:, -1:]
        # The first token beyond the draw: one without probability adds nothing, and is never that.
        return torch.searchsorted(cumulative, drawn, right=True).clamp(max=logits.shape[-1] - 1)

    def _penalize(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Padding is no token that was seen: it is replaced with the row's last prompt token, which was."""
        assert self._penalty is not None
        width = self._prompt_mask.shape[1]
        seen = input_ids.clone()
        seen[:, :width] = torch.where(self._prompt_mask.bool(), seen[:, :width], seen[:, width - 1 : width])
        return self._penalty(seen, scores)


class _Reader(LogitsProcessor):
    """Leaves given tokens as the only ones to choose, and keeps what the policy says of them."""

    def __init__(self, token_ids: Sequence[Sequence[int]], longest: int, device: torch.device) -> None:
        self.logprobs: list[torch.Tensor] = []
        """[B] for each position, at temperature 1; any value past a row's end."""
        self._token_ids = torch.zeros(len(token_ids), longest, dtype=torch.long)
        for i, row in enumerate(token_ids):
            self._token_ids[i, : len(row)] = torch.tensor(row)
        self._token_ids = self._token_ids.to(device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        tokens = self._token_ids[:, len(self.logprobs)].unsqueeze(-1)
        self.logprobs.append(torch.log_softmax(scores.float(), dim=-1).gather(-1, tokens).squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens, 0.0)  # type: ignore[return-value]


def _left_padded(prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
    """[B, longest] token ids and their attention mask."""
    input_ids = _on_the_left([torch.tensor(prompt.token_ids) for prompt in prompts])
    attention_mask = _on_the_left([torch.ones(len(prompt.token_ids), dtype=torch.long) for prompt in prompts])
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _generate(model: Any, **kwargs: Any) -> Any:
    """The class's own `generate`.

    Under FSDP2 accelerate puts another in its place that gathers weights before it and lets go of them after it. Here
    they are gathered for the whole rollout, since processes generate a different number of times.
    """
    return type(model).generate(model, **kwargs)


def _positions(prompts: Sequence[Prompt], images: ImageReader) -> dict[str, torch.Tensor]:
    """[K, B, longest] where positions count in K dimensions; none where they count in one, as everywhere."""
    each = [images.positions(prompt) for prompt in prompts]
    if len(each[0]) == 1:
        return {}
    return {"position_ids": torch.stack([_on_the_left(rows) for rows in zip(*each, strict=True)])}


def _token_types(prompts: Sequence[Prompt], images: ImageReader) -> dict[str, torch.Tensor]:
    """[B, longest], for a model that has to be told."""
    each = [types for prompt in prompts if (types := images.token_types(prompt)) is not None]
    return {"token_type_ids": _on_the_left(each)} if each else {}


def _on_the_left(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """[B, longest], with zeros before shorter rows."""
    result = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        result[i, result.shape[1] - len(row) :] = row
    return result


def _prefilled(model: Any, prompts: Sequence[Prompt], images: ImageReader | None = None) -> DynamicCache | None:
    """Keys and values of all tokens of the prompts but their last ones, a row each, computed once for equal prompts.

    None where nothing is gained, or the model keeps other state than keys and values.
    """
    unique = list({prompt.identity: prompt for prompt in prompts}.values())
    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    attends = all(isinstance(layer, DynamicLayer) for layer in cache.layers)
    inputs = _left_padded(unique)
    if images is not None:
        inputs |= _positions(unique, images) | _token_types(unique, images)
    # Models with positions in several dimensions shift those of a filled cache by what they saw last, unless they are
    # given them.
    is_placed = "position_ids" in inputs or not hasattr(model.base_model, "rope_deltas")
    is_plain = attends and is_placed and not model._is_stateful
    if len(unique) == len(prompts) or not is_plain or not model._supports_default_dynamic_cache():
        return None
    inputs = {name: each[..., :-1] for name, each in inputs.items()}
    if inputs["input_ids"].shape[1] == 0:
        return None
    inputs.setdefault("position_ids", (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0))
    if images is not None:
        inputs |= images.arguments(unique)
    model.base_model(
        **{name: each.to(model.device) for name, each in inputs.items()}, past_key_values=cache, use_cache=True
    )
    row_of = {prompt.identity: row for row, prompt in enumerate(unique)}
    cache.batch_select_indices(torch.tensor([row_of[prompt.identity] for prompt in prompts], device=model.device))
    return cache


def _batches(rows: Sequence[_Row], max_new_tokens: int, max_tokens: int) -> Iterator[list[_Row]]:
    """Consecutive rows whose padded size stays within `max_tokens`."""
    batch: list[_Row] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row.prompt.token_ids))
        if batch and (longest + max_new_tokens) * (len(batch) + 1) > max_tokens:
            yield batch
            batch, longest = [], len(row.prompt.token_ids)
        batch.append(row)
    if batch:
        yield batch


@contextlib.contextmanager
def _as_sampler(model: Any, generation_config: GenerationConfig) -> Iterator[None]:
    """Evaluation mode and our generation config, then exactly what was there before.

    The config is put in the place of the model's own because `generate` fills every option left open from there: a
    checkpoint's top_p or repetition penalty would be applied silently.
    """
    training = {module: module.training for module in model.modules()}
    own_config = model.generation_config
    model.eval()
    model.generation_config = generation_config
    try:
        yield
    finally:
        model.generation_config = own_config
        for module, mode in training.items():
            module.training = mode
