"""Whether a model gives the same log-probabilities the fast way as the plain one: compared once, before a run."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from grpo_stage.distributed import all_gather
from grpo_stage.types import Completion, FinishReason, ImageReader, Prompt
from grpo_stage.update.attention import attention_of
from grpo_stage.update.batch import Layout, PaddedLayout, Row
from grpo_stage.update.logprobs import Forward
from grpo_stage.update.strategies.strategy import Strategy


logger = logging.getLogger(f"llamafactory.{__name__}")  # seen wherever the host's messages are

TOLERANCE, HALF_PRECISION_TOLERANCE = 1e-4, 0.1
"""Mean difference of log-probabilities, in nats. Both ways round differently, by 1e-6 in float32 and 0.01 to 0.05 in
half precision (or TF32); a completion that sees another one, or not its prompt, differs by far more."""
PROMPT_TOKENS, COMPLETION_TOKENS = 256, (12, 5, 9)
"""Of what is compared: the ends of two prompts, and completions made of the other one's tokens."""


def settle(
    forward: Forward,
    plain: PaddedLayout,
    model: nn.Module,
    prompts: Sequence[Prompt],
    autocast: Callable[[], AbstractContextManager],
    strategy: Strategy,
) -> None:
    """Leave of `forward` what is exact for this model. All ranks call it together.

    Args:
        forward: what the recipe asks for.
        plain: the layout that is right for any model.
        model: the policy without DDP.
        prompts: of the run.
        autocast: the precision of a forward pass.
        strategy: how the model's parameters are distributed.
    """
    if isinstance(forward.layout, PaddedLayout) and not forward.is_chunked:
        return
    rows = probe_rows(prompts, plain.images)
    compare = partial(_logprobs, model=model, rows=rows, autocast=autocast, strategy=strategy)
    expected, failure = _attempt(partial(compare, Forward(plain, is_chunked=False)))
    problems = []
    for candidate in _candidates(forward, plain):
        actual, problem = (None, failure) if expected is None else _attempt(partial(compare, candidate))
        if expected is not None and actual is not None:
            problem = _difference(actual - expected, rows, model, autocast)
        problem = next((each for each in all_gather(problem) if each is not None), None)
        if problem is None:
            break
        problems.append(problem)
    if candidate.layout is not forward.layout:
        logger.warning(
            f"Sharing prompts is not exact for {type(model).__name__} ({problems[0]}): each completion goes through "
            "the model with its own copy of the prompt, as with `disable_prompt_sharing: true`."
        )
    if candidate.is_chunked != forward.is_chunked:
        logger.warning(
            f"Logits in parts are not exact for {type(model).__name__} ({problems[-1]}): those of a micro-batch are "
            "computed at once, as with `disable_logit_chunking: true`, which takes memory for tokens x vocabulary."
        )
    forward.layout, forward.is_chunked = candidate.layout, candidate.is_chunked


def _candidates(forward: Forward, plain: PaddedLayout) -> Iterator[Forward]:
    """The fastest first; the last one is the plain way."""
    layouts: list[Layout] = [forward.layout] if isinstance(forward.layout, PaddedLayout) else [forward.layout, plain]
    for is_chunked in (True, False) if forward.is_chunked else (False,):
        for layout in layouts:
            yield replace(forward, layout=layout, is_chunked=is_chunked)


def _attempt(compare: Callable[[], torch.Tensor]) -> tuple[torch.Tensor | None, str | None]:
    """Log-probabilities, or why there are none: any error of the model's own code. The plain way needs none of it, and
    if that fails as well, the first pass of the run says so."""
    try:
        return compare(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def _difference(
    difference: torch.Tensor, rows: Sequence[Row], model: nn.Module, autocast: Callable[[], AbstractContextManager]
) -> str | None:
    """[B, T] in words: of the completion that differs most; None if it is rounding."""
    lengths = torch.tensor([len(row.completion.token_ids) for row in rows], device=difference.device)
    worst = (difference.abs().sum(dim=1) / lengths).max().item()
    with autocast():
        is_half = torch.is_autocast_enabled(difference.device.type)
    is_half |= any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    is_half |= difference.is_cuda and torch.backends.cuda.matmul.allow_tf32
    if worst <= (HALF_PRECISION_TOLERANCE if is_half else TOLERANCE):
        return None
    return f"its log-probabilities differ by {worst:.2g} nats a token"


def _logprobs(
    forward: Forward,
    *,
    model: nn.Module,
    rows: Sequence[Row],
    autocast: Callable[[], AbstractContextManager],
    strategy: Strategy,
) -> torch.Tensor:
    """[B, T] at temperature 1, by a pass that goes back to a trained weight as well, if there is one.

    Raises:
        NotImplementedError: if the model hides a window or chunks of its attention from the attention function.
    """
    batch = forward.layout.tokens(rows)
    shared, is_trained = batch.inputs.shared_prompts, any(p.requires_grad for p in model.parameters())
    with attention_of(model, shared):
        with autocast(), torch.set_grad_enabled(is_trained):
            logprobs = forward.statistics(model, batch, 1.0).logprobs
        if is_trained:
            strategy.try_backward(model, logprobs.sum())
    if shared is not None:
        _refuse_hidden_windows(model, shared.windows)
    return logprobs.detach()


def _refuse_hidden_windows(model: Any, windows: set[int | None]) -> None:
    """transformers builds such masks for its own attention functions alone; the probe is too short to notice."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or []
    has_window = "sliding_attention" in kinds or (not kinds and bool(getattr(config, "sliding_window", None)))
    if "chunked_attention" in kinds or (has_window and windows <= {None}):
        raise NotImplementedError("its layers do not hand on the window of their attention")


def probe_rows(prompts: Sequence[Prompt], images: ImageReader | None = None) -> list[Row]:
    """Three completions for each of two prompts, from the tokens of the prompts: no model is needed to make them.

    Prompts with images come first. They are whole: a part of an image's tokens belongs to no image.
    """
    placeholder = None if images is None else images.placeholder
    ordered = sorted(prompts, key=lambda each: not each.images) if images is not None else prompts
    first = ordered[0]
    second = next((each for each in ordered if each.identity != first.identity), None)
    if second is None:
        token_ids = tuple(token for token in first.token_ids[::-1] if token != placeholder)
        second = replace(first, token_ids=token_ids, images=())
    rows = []
    for own, other in ((first, second), (second, first)):
        kept = own.token_ids if own.images else own.token_ids[-PROMPT_TOKENS:]
        prompt = Prompt(index=0, token_ids=kept, messages=(), reference=None, images=own.images)
        tokens = tuple(token for token in other.token_ids[::-1] if token != placeholder)
        for length in COMPLETION_TOKENS:
            rows.append(Row(prompt, Completion(
                token_ids=(tokens * length)[:length], sampling_logprobs=(0.0,) * length,
                finish_reason=FinishReason.STOP, text="",
            )))  # fmt: skip
    return rows
