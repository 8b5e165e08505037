"""What the parts of a step cost: a pass of an engine, an update of a rank, a delivery of weights.

Everything is a roofline: bytes over a bandwidth or operations over a speed, whichever takes longer, with a share of
the data sheet's figure that is stated in `Rates`. Rewards, logs, checkpoints and offloading to main memory are
left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from grpo_stage.layout.cards import Card
from grpo_stage.layout.syntax import Layout
from grpo_stage.update.model_flops import TokenFlops


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What is reached of the data sheets' figures. docs/scaling.md says which measurement each is from."""

    update: float = 0.26
    """Of a card's FLOP/s in the update, gradient checkpointing's second forward pass counted."""
    layer_s: float = 4e-3
    """What a layer takes in a micro-batch beside its operations: launching kernels."""
    prefill: float = 0.5
    """Of a card's FLOP/s in an engine."""
    memory: float = 0.9
    """Of a card's memory bandwidth in decoding."""
    collective: float = 0.8
    """Of a link's bandwidth in gathers and sums over ranks."""
    token_s: float = 2.7e-3
    """What a pass of an engine takes beside its work: scheduling, launching kernels, sampling."""
    sequence_s: float = 17e-6
    """The same, for each completion in the pass."""
    reduction_s: float = 10e-6
    """Of a sum over the cards of an engine; two in each layer."""
    sync_s: float = 0.07
    """Of a delivery of an adapter or of weights beside its bytes."""
    load: float = 5.1e9
    """Bytes a second at which an engine takes whole weights, tensor by tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """What a step needs to know of a model."""

    num_layers: int
    engine_weights: float
    """Bytes of the engine's copy."""
    engine_experts: float = 0.0
    """Of these, a mixture's experts."""
    expert_share: float = 1.0
    """Of the experts, those that a token meets."""
    kv: float
    """Bytes of keys and values of a token in the engine."""
    kv_parts: int
    """Into how many parts tensor parallelism can divide them: the heads of keys, 1 for a latent cache."""
    engine_flops: float
    """Of a token in an engine's pass, output layer included."""
    key_flops: float
    """Of a token in an engine's pass, for each token in front of it."""
    token: TokenFlops
    """Of the update."""
    weights: float
    """Bytes of the weights that a pass of the trainer computes with; sharding gathers them."""
    gradients: float
    """Bytes that ranks sum, in the precision of the weights."""
    sharded_gradients: float
    """The same with ZeRO or FSDP, which sum in the precision of the passes."""
    delivered: float
    """Bytes of a sync: an adapter, or all weights."""
    is_adapter: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One rollout and what learns from it."""

    num_prompts: int
    """Of each rank."""
    group_size: int
    prompt_length: int
    num_optimizer_steps: int = 1
    """Of a rollout."""
    num_iterations: int = 1
    """How many times each completion is learned from."""
    num_scorings: int = 0
    """Forward passes without a gradient: a reference, or the log-probabilities of old weights."""
    max_tokens: int = 8192
    """Of a micro-batch."""
    checkpointing: bool = True
    shares_prompts: bool = True
    runs_ahead: bool = False
    """`rollout_ahead`."""
    max_in_flight: int = 1024
    """Completions that an engine is given at a time, if its card does not allow fewer."""


class DecodeCost(NamedTuple):
    """Seconds of one pass in which each running completion gets a token, by what they go to."""

    overhead: float
    weights: float
    keys: float
    compute: float
    """What the operations take longer than the bytes."""

    @property
    def total(self) -> float:
        return sum(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCost:
    """An engine of one or several cards."""

    card: Card
    num_cards: int
    model: ModelCost
    rates: Rates
    memory: float
    """Bytes of each card that weights and cache can take."""
    max_in_flight: int = 1024

    @property
    def capacity(self) -> int:
        """Tokens that the cache has room for."""
        left = self.memory - self.model.engine_weights / self.num_cards
        return max(0, int(left / (self.model.kv / self._kv_parts)))

    @property
    def _kv_parts(self) -> int:
        return min(self.num_cards, self.model.kv_parts)

    def prefill(self, length: int) -> float:
        """Seconds of a prompt."""
        flops = self.model.engine_flops * length + self.model.key_flops * length * (length + 1) / 2
        return flops / (self.card.flops * self.rates.prefill * self.num_cards)

    def decode(self, num_running: int, context: float) -> DecodeCost:
        """A token for each of `num_running` completions, whose prompts and tokens so far are `context` in all."""
        model, rates = self.model, self.rates
        bandwidth = self.card.memory_bandwidth * rates.memory
        unmet = (1 - model.expert_share) ** num_running
        read = model.engine_weights - model.engine_experts * unmet
        weights = read / self.num_cards / bandwidth
        keys = context * model.kv / self._kv_parts / bandwidth
        flops = num_running * model.engine_flops + context * model.key_flops
        compute = flops / (self.card.flops * rates.prefill * self.num_cards)
        overhead = rates.token_s + num_running * rates.sequence_s
        if self.num_cards > 1:
            overhead += 2 * model.num_layers * rates.reduction_s
        return DecodeCost(overhead, weights, keys, max(0.0, compute - weights - keys))


class UpdateCost(NamedTuple):
    """Seconds of a rank's update."""

    compute: float
    communication: float
    """What gathers and sums take beyond the computation that hides them."""

    @property
    def total(self) -> float:
        return sum(self)


def update_cost(
    layout: Layout, model: ModelCost, work: Work, rates: Rates, groups: Sequence[Sequence[int]]
) -> UpdateCost:
    """Of a rank that learns from `groups`, each the lengths of a prompt's completions.

    DDP and ZeRO-2 move gradients (and ZeRO-2 new weights) once an optimizer step, and nothing hides that. ZeRO-3 and
    FSDP gather all weights twice and scatter the gradients once in each micro-batch, while the micro-batch computes:
    the longer of the two counts.
    """
    length, flops = work.prompt_length, model.token
    completions = [(length, own) for group in groups for own in group]
    prompts = [length] * (len(groups) if work.shares_prompts else len(completions))
    num_tokens = sum(prompts) + sum(own for _, own in completions)
    once = flops.of_batch(prompts, completions)
    again = num_tokens * flops.forward if work.checkpointing else 0.0
    total = work.num_iterations * (once + again) + work.num_scorings * once * flops.forward / flops.body
    num_micro_batches = -(-num_tokens // work.max_tokens)
    num_learned, num_scored = work.num_iterations * num_micro_batches, work.num_scorings * num_micro_batches
    launched = (num_learned + num_scored / 3) * model.num_layers * rates.layer_s
    compute = total / (layout.card.flops * rates.update) + launched
    if layout.num_trainers == 1:
        return UpdateCost(compute, 0.0)
    bandwidth = train_bandwidth(layout) * rates.collective
    moved = (layout.num_trainers - 1) / layout.num_trainers / bandwidth
    if layout.sharding in ("none", "zero2"):
        summed = model.gradients if layout.sharding == "none" else model.sharded_gradients
        return UpdateCost(compute, work.num_optimizer_steps * work.num_iterations * 2 * summed * moved)
    gathered = (2 * num_learned + num_scored) * model.weights + num_learned * model.sharded_gradients
    return UpdateCost(compute, max(0.0, gathered * moved - compute))


def train_bandwidth(layout: Layout) -> float:
    """Bytes a second that a card gives and takes in a ring over all that train: a ring leaves each node once."""
    card = layout.card
    if layout.num_trainers <= layout.cards_of_a_node:
        return card.link
    return min(card.link, card.network)


def sync_seconds(layout: Layout, model: ModelCost, rates: Rates) -> float:
    """Of a delivery: shards are gathered, sent to the engines, and taken by each, tensor by tensor."""
    if model.is_adapter:
        sent = 0.0 if layout.is_colocated else model.delivered / _sync_bandwidth(layout)
        return rates.sync_s + sent
    seconds = rates.sync_s + model.delivered / rates.load
    if layout.sharding in ("zero3", "fsdp") and layout.num_trainers > 1:
        seconds += model.delivered / (train_bandwidth(layout) * rates.collective)
    if not layout.is_colocated:
        seconds += model.delivered / (_sync_bandwidth(layout) * rates.collective)
    return seconds


def _sync_bandwidth(layout: Layout) -> float:
    """From one rank to the engines. A single rank sends through its own adapter, an eighth of the node's."""
    if layout.num_nodes == 1:
        return min(layout.card.link, layout.engine_card.link)
    return min(layout.card.network, layout.engine_card.network) / 8
