"""Attention over a stream in which the completions of a group share the tokens of their prompt.

    stream      [prompt 1] [completion] [completion] ... [prompt 2] [completion] ...

A token sees its own prompt, and its own completion up to itself. Each completion is a block of queries, whose keys
are those of the prompt and its own; so the kernels are dense ones and nothing of other completions is computed.

    N tokens of the stream    H heads    D head size
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.utils import is_flash_attn_2_available


NAME = "grpo_stage_shared_prompts"
"""Of the attention function, in a model's config."""
MERGED_QUERIES = 128
"""Short completions of a group are one block of about so many queries: more than they need is computed, and masked,
in fewer calls."""


@dataclass(frozen=True, slots=True)
class Family:
    """A prompt and the completions after it in the stream."""

    prompt: int
    """Length of the prompt."""
    completions: tuple[int, ...]
    """Lengths; some may be 0."""

    @property
    def length(self) -> int:
        return self.prompt + sum(self.completions)


@dataclass(frozen=True, slots=True)
class _Block:
    """Queries that are attended together: tokens [start, end) of a family."""

    start: int
    end: int


class SharedPrompts:
    """Who sees whom in a stream of families: a keyword argument of a model's forward pass, which hands it on to its
    attention.

    Args:
        families: in the order of the stream.
        device: where masks and indices go.
    """

    def __init__(self, families: Sequence[Family], device: torch.device) -> None:
        self._families = families
        self._device = device
        self._masks: dict[Any, torch.Tensor | None] = {}
        self._blocks = [_blocks(family) for family in families]
        self._pieces = [
            block.end - block.start for blocks in self._blocks for block in blocks
        ]  # of the stream, in its order
        self._varlen: _Lengths | None = None
        self.windows: set[int | None] = set()
        """The sliding windows that the layers have asked for."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """[1, N, H, D] of queries [1, H, N, D], keys and values [1, H or fewer, N, D]."""
        self.windows.add(sliding_window)
        if torch.is_autocast_enabled(query.device.type):  # norms of queries and keys may have raised their precision
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if softcap is None and _has_varlen_kernel(query, value):
            return self._attend_varlen(query, key, value, scaling, sliding_window)
        groups = query.size(1) // key.size(1)
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        pieces = zip(*(each.split(self._pieces, dim=2) for each in (query, key, value)), strict=True)
        outputs = []
        for number, (family, blocks) in enumerate(zip(self._families, self._blocks, strict=True)):
            first: tuple[torch.Tensor, torch.Tensor] | None = None
            for block in blocks:
                q, k, v = next(pieces)
                if first is None:
                    first = k, v
                else:
                    k, v = torch.cat([first[0], k], dim=2), torch.cat([first[1], v], dim=2)
                mask = self._mask(number, family, block, sliding_window, query.dtype)
                if softcap is not None:
                    outputs.append(_with_softcap(q, k, v, mask, scaling, softcap))
                else:
                    is_causal = mask is None and q.size(2) > 1
                    outputs.append(
                        functional.scaled_dot_product_attention(
                            q, k, v, attn_mask=mask, is_causal=is_causal, scale=scaling
                        )
                    )
        return torch.cat(outputs, dim=2).transpose(1, 2)

    def _mask(
        self, number: int, family: Family, block: _Block, window: int | None, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """[queries, keys], 0 where a query sees a key and -inf elsewhere; None for a plain causal block."""
        if window is not None and window >= family.prompt + max(family.completions, default=0):
            window = None
        if block.end <= family.prompt and window is None:
            return None
        key = (number, block, window, dtype)
        if key not in self._masks:
            lengths = torch.tensor([family.prompt, *family.completions], device=self._device)
            owners = torch.arange(-1, len(family.completions), device=self._device)
            owners = owners.repeat_interleave(lengths, output_size=family.length)
            starts = lengths.cumsum(0) - lengths - family.prompt
            starts[0] = 0
            positions = torch.arange(family.length, device=self._device) - starts.repeat_interleave(
                lengths, output_size=family.length
            )
            queries = torch.arange(block.start, block.end, device=self._device)
            keys = queries
            if block.start > 0:
                keys = torch.cat([torch.arange(family.prompt, device=self._device), queries])
            sees = (owners[keys] == -1) | (owners[queries].unsqueeze(1) == owners[keys])
            sees &= positions[queries].unsqueeze(1) >= positions[keys]
            if window is not None:
                sees &= positions[queries].unsqueeze(1) < positions[keys] + window
            self._masks[key] = torch.zeros(sees.shape, dtype=dtype, device=self._device).masked_fill_(
                ~sees, -torch.inf
            )
        return self._masks[key]

    def _attend_varlen(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None
    ) -> torch.Tensor:
        """By the kernels for sequences of different lengths: each completion's keys are its prompt's and its own."""
        if self._varlen is None:
            self._varlen = _Lengths.of(self._families, self._device)
        lengths = self._varlen
        q, k, v = (each.squeeze(0).transpose(0, 1) for each in (query, key, value))  # [N, H, D]
        k, v = k.index_select(0, lengths.keys), v.index_select(0, lengths.keys)
        left = -1 if window is None else window - 1
        if _has_flash_attention():
            from flash_attn import flash_attn_varlen_func

            output = flash_attn_varlen_func(
                q, k, v, lengths.cu_queries, lengths.cu_keys, lengths.max_queries, lengths.max_keys,
                softmax_scale=scaling, causal=True, window_size=(left, 0 if left >= 0 else -1),
                deterministic=torch.are_deterministic_algorithms_enabled(),
            )  # fmt: skip
        else:
            from torch.nn.attention.varlen import varlen_attn

            groups = q.size(1) // k.size(1)
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
            output = varlen_attn(
                q.contiguous(), k, v, lengths.cu_queries, lengths.cu_keys, lengths.max_queries, lengths.max_keys,
                scale=scaling, window_size=(left, 0),
            )  # fmt: skip
        return output.unsqueeze(0)


@dataclass(frozen=True, slots=True)
class _Lengths:
    """Prompts and completions as sequences for the kernels of variable length."""

    cu_queries: torch.Tensor
    cu_keys: torch.Tensor
    """[sequences + 1] int32, where each begins."""
    keys: torch.Tensor
    """Positions in the stream of the keys of one sequence after another."""
    max_queries: int
    max_keys: int

    @classmethod
    def of(cls, families: Sequence[Family], device: torch.device) -> "_Lengths":
        start, queries, keys = 0, [], []
        for family in families:
            prompt = torch.arange(start, start + family.prompt)
            queries.append(family.prompt)
            keys.append(prompt)
            start += family.prompt
            for length in filter(None, family.completions):
                queries.append(length)
                keys.append(torch.cat([prompt, torch.arange(start, start + length)]))
                start += length
        num_keys = [len(each) for each in keys]
        cu_queries, cu_keys = (torch.tensor([0, *each]).cumsum(0).int().to(device) for each in (queries, num_keys))
        return cls(cu_queries, cu_keys, torch.cat(keys).to(device), max(queries), max(num_keys))


def _has_varlen_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the kernels for sequences of different lengths take such heads."""
    size = query.size(-1)
    fits = query.dtype in (torch.float16, torch.bfloat16) and size == value.size(-1) and size % 8 == 0 and size <= 256
    return query.is_cuda and fits and torch.cuda.get_device_capability(query.device) >= (8, 0)


@cache
def _has_flash_attention() -> bool:
    return bool(is_flash_attn_2_available())


def _blocks(family: Family) -> list[_Block]:
    """The prompt with the first completions where all are short, then one block for about `MERGED_QUERIES` tokens."""
    ends, end = [], family.prompt
    for length in family.completions:
        end += length
        ends.append(end)
    if end <= 2 * MERGED_QUERIES:
        return [_Block(0, end)]
    blocks = [_Block(0, family.prompt)]
    for end in ends:
        last = blocks[-1]
        is_full = last.end == family.prompt or end - last.start > MERGED_QUERIES
        if end == last.end:
            continue
        blocks[-1:] = [last, _Block(last.end, end)] if is_full else [_Block(last.start, end)]
    return blocks


def _with_softcap(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scaling: float, softcap: float
) -> torch.Tensor:
    """Attention whose scores are bounded by `softcap`, as Gemma 2 has it."""
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * scaling / softcap)
    if mask is None:
        mask = torch.full(scores.shape[-2:], -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    return functional.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def _shared_prompt_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    shared_prompts: SharedPrompts,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers."""
    if s_aux is not None:
        raise NotImplementedError("attention sinks")
    scaling = query.size(-1) ** -0.5 if scaling is None else scaling
    output = shared_prompts.attend(query, key, value, scaling=scaling, sliding_window=sliding_window, softcap=softcap)
    return output.contiguous(), None


AttentionInterface.register(NAME, _shared_prompt_attention)


@contextmanager
def attention_of(model: Any, shared_prompts: SharedPrompts | None) -> Iterator[None]:
    """In this block a Hugging Face model, wrapped or not, attends as `shared_prompts` says; as ever if that is None.

    What reads images attends as ever. The backward pass belongs into the block as well: with gradient checkpointing it
    attends again.
    """
    if shared_prompts is None:
        yield
        return
    while hasattr(model, "module"):  # DDP
        model = model.module
    config = model.config.get_text_config()
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    own = {"": config._attn_implementation}
    own |= {key: part._attn_implementation for key, part in parts.items() if part is not None}
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = own
