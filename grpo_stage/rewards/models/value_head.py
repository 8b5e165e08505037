"""Scores of a causal language model with a value head, in this process.

B completions in a batch    L tokens of prompt and completion, right-padded as `stage: rm` pads    H hidden size
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn
from torch.nn import functional

from grpo_stage.rewards.models.refusals import HEAD_BIAS, HEAD_WEIGHT
from grpo_stage.update.logprobs import takes_logits_to_keep


class ValueHeadScorer:
    """Scores token sequences by what the head says of the last hidden state of each."""

    def __init__(
        self,
        activate: Callable[[], AbstractContextManager[nn.Module]],
        head: Mapping[str, torch.Tensor],
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        """
        Args:
            activate: a context that yields the model, and restores what it changes for that.
            head: `v_head.summary.weight` [1, H] and `v_head.summary.bias` [1], as the host keeps them.
            autocast: the precision of a forward pass.
        """
        self._activate = activate
        self._weight, self._bias = (head[key].detach().float() for key in (HEAD_WEIGHT, HEAD_BIAS))
        self._autocast = autocast

    @torch.no_grad()
    def __call__(self, sequences: Sequence[tuple[int, ...]]) -> list[float]:
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        input_ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)  # [B, L]; padding is masked
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


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
