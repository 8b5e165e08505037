"""A PPO step (Schulman et al., arXiv:1707.06347) with a critic that is a model of its own, for comparisons of memory.

The policy's side is this stage's own: the same rollout, the same micro-batches and lengths, prompts shared, logits in
chunks, the same clipped loss. Only the advantages differ: they are those of generalized advantage estimation
(arXiv:1506.02438) from the values of a critic, which is a copy of the policy with one number a token in the place of
logits. It is trained in the same way (full, or an adapter on its own base), in the same layout and micro-batches, by
an optimizer of the same kind. Policy and critic learn one after the other, so that they share the memory of
activations, and the critic's gradients are gone when the policy's begin.
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer

from grpo_stage.memory.measure import MeasuredTrainer
from grpo_stage.memory.sizes import sizes_of
from grpo_stage.types import Sample, Step, TokenBatch
from grpo_stage.update.attention import attention_of


DISCOUNT, LAMBDA, VALUE_CLIP = 1.0, 0.95, 0.2


def critic_of(policy: Any) -> Any:
    """A copy of a policy, on its device, with one number a token in the place of logits; trained as the policy is."""
    critic = copy.deepcopy(policy)
    base = critic.get_base_model() if isinstance(critic, PeftModel) else critic
    config, device = base.config.get_text_config(), base.get_input_embeddings().weight.device
    head = nn.Linear(config.hidden_size, 1, bias=False, dtype=torch.float32, device=device)
    if device.type != "meta":
        nn.init.zeros_(head.weight)
    base.set_output_embeddings(head)
    return critic


def generalized_advantages(reward: float, values: torch.Tensor) -> torch.Tensor:
    """[T] from the reward of a whole completion and the values [T] before each of its tokens.

    delta_t = r_t + gamma V_(t+1) - V_t, with the reward at the last token; A_t = sum over l of (gamma lambda)^l
    delta_(t+l).
    """
    following = torch.cat([values[1:], values.new_zeros(1)])
    deltas = DISCOUNT * following - values
    deltas[-1] += reward
    advantages = torch.empty_like(deltas)
    carried = values.new_zeros(())
    for t in range(len(deltas) - 1, -1, -1):
        carried = deltas[t] + DISCOUNT * LAMBDA * carried
        advantages[t] = carried
    return advantages


class PPOTrainer(MeasuredTrainer):
    """PPO's step on the stage's trainer."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.critic = critic_of(self.model).train()
        # Trainer's own kind of optimizer, as of the policy.
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(self.args)
        self.critic_optimizer = kind([p for p in self.critic.parameters() if p.requires_grad], **settings)

    def states(self) -> Iterator[Mapping[str, Any]]:
        yield from super().states()
        yield from self.critic_optimizer.state.values()

    def count(self) -> None:
        super().count()
        self.parts["critic"] = int(sizes_of(self.critic).weights)

    def learn(self, model: nn.Module, step: Step, global_step: int) -> torch.Tensor:
        """Values, advantages, the critic's update, and the policy's."""
        with self.phases.timed("values"):
            values = self._values_of_all(step.samples)
        samples, returns = [], []
        for sample, own in zip(step.samples, values, strict=True):
            advantages = generalized_advantages(sample.total_reward or 0.0, own)
            returns.append(advantages + own)
            samples.append(
                dataclasses.replace(sample, token_advantages=advantages, advantage=float(advantages.mean()))
            )
        with self.phases.timed("update of the critic"):
            self._learn_critic(samples, values, returns)
            self.critic_optimizer.step()
            self.critic_optimizer.zero_grad(set_to_none=True)
        return super().learn(model, dataclasses.replace(step, samples=tuple(samples)), global_step)

    @torch.no_grad()
    def _values_of_all(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        layout = self.learner.forward.layout
        for positions in layout.split(samples, self.learner.budget.max_tokens):
            batch = layout.tokens([samples[i] for i in positions])
            with attention_of(self.critic, batch.inputs.shared_prompts):
                values = self._values(batch)
            for row, position in enumerate(positions):
                found[position] = values[row, : len(samples[position].completion.token_ids)].cpu()
        return [found[i] for i in range(len(samples))]

    def _learn_critic(
        self, samples: Sequence[Sample], old: Sequence[torch.Tensor], returns: Sequence[torch.Tensor]
    ) -> None:
        """The clipped loss of values, in the mean over the tokens of the step."""
        layout = self.learner.forward.layout
        num_tokens = sum(len(each) for each in old)
        for positions in layout.split(samples, self.learner.budget.max_tokens):
            batch = layout.tokens([samples[i] for i in positions])
            before, target = torch.zeros_like(batch.completion_mask), torch.zeros_like(batch.completion_mask)
            for row, position in enumerate(positions):
                before[row, : len(old[position])] = old[position]
                target[row, : len(old[position])] = returns[position]
            with attention_of(self.critic, batch.inputs.shared_prompts):
                values = self._values(batch)
                clipped = before + (values - before).clamp(-VALUE_CLIP, VALUE_CLIP)
                losses = 0.5 * torch.maximum((values - target).square(), (clipped - target).square())
                self.accelerator.backward((losses * batch.completion_mask).sum() / num_tokens)

    def _values(self, batch: TokenBatch) -> torch.Tensor:
        """[B, T], what the critic expects before each token; 0 outside the completions."""
        base = self.critic.get_base_model() if isinstance(self.critic, PeftModel) else self.critic
        shared = batch.inputs.shared_prompts
        with self.accelerator.autocast():
            hidden = base.base_model(
                input_ids=batch.inputs.input_ids,
                attention_mask=batch.inputs.attention_mask,
                position_ids=batch.inputs.position_ids,
                use_cache=False,
                **({} if shared is None else {"shared_prompts": shared}),
            ).last_hidden_state.flatten(0, 1)
            values = base.get_output_embeddings()(hidden[batch.inputs.predictors]).squeeze(-1).float()  # [M]
        return torch.zeros_like(batch.completion_mask).masked_scatter(batch.completion_mask.bool(), values)
