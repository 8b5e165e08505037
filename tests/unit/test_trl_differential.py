"""Our loss beside TRL 0.24.0's own `GRPOTrainer._compute_loss`, on the same tensors.

The method is called unbound on a stand-in that has only the attributes it reads. Where its denominator is known to be
wrong (dapo when generation and accumulation differ or truncated completions are masked, grpo with masked completions,
bnpo over more than one micro-batch) it is given only what it gets right.
"""

import importlib
import inspect
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from grpo_stage.algorithm.advantages import group_advantages
from grpo_stage.algorithm.averages import StepTotals, token_weights
from grpo_stage.algorithm.catalog import canonical
from grpo_stage.algorithm.correction import correction_weights
from grpo_stage.algorithm.exploration import highest_entropy_tokens
from grpo_stage.algorithm.kl import k3
from grpo_stage.algorithm.losses import LOSSES, LossSettings, TokenInputs


EPSILON, EPSILON_HIGH, MAX_LENGTH = 0.2, 0.28, 12


@pytest.fixture(scope="module")
def trl_grpo() -> Iterator[ModuleType]:
    """TRL's module, in a private import of trl that leaves no trace.

    TRL reads transformers' `(available, version)` tuples as flags, so under transformers 5 every optional package
    counts as installed; and what it wants of vllm is gone from the vllm installed here.
    """

    def of_trl() -> list[str]:
        return [name for name in sys.modules if name == "trl" or name.startswith("trl.")]

    others = {name: sys.modules.pop(name) for name in of_trl()}
    flags = importlib.import_module("trl.import_utils")
    for name, value in list(vars(flags).items()):
        if name.endswith("_available") and isinstance(value, tuple):
            setattr(flags, name, value[0])
    vars(flags).update(_vllm_available=False, _vllm_ascend_available=False)
    yield importlib.import_module("trl.trainer.grpo_trainer")
    for name in of_trl():
        del sys.modules[name]
    sys.modules.update(others)


class Batch:
    """A micro-batch of ragged completions, off-policy on both sides of the bounds."""

    def __init__(self, seed: int, num_completions: int = 6) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (num_completions, 10)
        self.old = torch.randn(shape, generator=generator, dtype=torch.float64) - 2.0
        self.policy = self.old + torch.randn(shape, generator=generator, dtype=torch.float64) * 0.4
        self.ref = self.old + torch.randn(shape, generator=generator, dtype=torch.float64) * 0.4
        self.advantages = torch.randn(num_completions, generator=generator, dtype=torch.float64)
        self.lengths = torch.randint(1, shape[1] + 1, (num_completions,), generator=generator)
        self.entropies = torch.rand(shape, generator=generator, dtype=torch.float64)
        self.sampling = self.old + torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3
        self.mask = (torch.arange(shape[1]) < self.lengths.unsqueeze(1)).double()


def trl_losses(
    trl_grpo: ModuleType,
    batches: list[Batch],
    loss_type: str,
    beta: float,
    on_policy: bool = False,
    *,
    level: str = "token",
    delta: float | None = None,
    quantile: float = 1.0,
    cap: float | None = None,
) -> tuple[float, list[torch.Tensor], dict[str, list[float]]]:
    """The loss of a step, its gradients by micro-batch, and TRL's metrics."""
    metrics: dict[str, list[float]] = defaultdict(list)
    stand_in = SimpleNamespace(
        beta=beta,
        loss_type=loss_type,
        epsilon_low=EPSILON,
        epsilon_high=EPSILON_HIGH,
        max_completion_length=MAX_LENGTH,
        current_gradient_accumulation_steps=len(batches),
        importance_sampling_level=level,
        top_entropy_quantile=quantile,
        use_vllm=cap is not None,
        vllm_importance_sampling_correction=True,
        args=SimpleNamespace(delta=delta),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda tensor: tensor, device=torch.device("cpu")),
        model=SimpleNamespace(training=True),
        _metrics={"train": metrics},
    )
    stand_in.get_high_entropy_mask = lambda *a: trl_grpo.GRPOTrainer.get_high_entropy_mask(stand_in, *a)
    stand_in.accelerator.pad_across_processes = lambda tensor, **_: tensor
    total, gradients = 0.0, []
    for batch in batches:
        policy = batch.policy.clone().requires_grad_()
        logprobs_and_entropies = policy, batch.entropies
        stand_in._get_per_token_logps_and_entropies = lambda *_, given=logprobs_and_entropies, **__: given
        ids = torch.zeros_like(batch.mask, dtype=torch.long)
        inputs: dict[str, Any] = {
            "prompt_ids": ids[:, :2],
            "prompt_mask": ids[:, :2] + 1,
            "completion_ids": ids,
            "completion_mask": batch.mask,
            "advantages": batch.advantages,
            "ref_per_token_logps": batch.ref,
            "num_items_in_batch": sum(other.mask.sum() for other in batches),
        }
        if cap is not None:  # as `_generate_and_score_completions` has it
            inputs["importance_sampling_ratio"] = torch.clamp(torch.exp(batch.old - batch.sampling), max=cap)
        if not on_policy:
            inputs["old_per_token_logps"] = batch.old
        loss = trl_grpo.GRPOTrainer._compute_loss(stand_in, None, inputs)
        loss.backward()
        assert policy.grad is not None
        total += loss.item()
        gradients.append(policy.grad)
    return total, gradients, metrics


def our_losses(
    batches: list[Batch],
    loss_type: str,
    beta: float,
    on_policy: bool = False,
    *,
    level: str = "token",
    delta: float | None = None,
    quantile: float = 1.0,
    cap: float | None = None,
) -> tuple[float, list[torch.Tensor], list[Any]]:
    names = {"loss_type": loss_type, "importance_sampling_level": level}
    loss_type, level = (names | canonical(names)).values()
    totals = StepTotals(
        num_completions=sum(int(batch.mask.any(1).sum()) for batch in batches),
        num_tokens=sum(int(batch.mask.sum()) for batch in batches),
        max_completion_length=MAX_LENGTH,
        num_left_out=sum(int((~batch.mask.any(1)).sum()) for batch in batches),
    )
    total, gradients, outputs = 0.0, [], []
    for batch in batches:
        policy = batch.policy.clone().requires_grad_()
        old = policy.detach() if on_policy else batch.old
        settings = LossSettings(
            epsilon=EPSILON, epsilon_high=EPSILON_HIGH, delta=delta, importance_sampling_level=level
        )
        output = LOSSES[loss_type].surrogate(TokenInputs(policy, old, batch.advantages, batch.mask), settings)
        token_losses = output.token_losses
        if quantile < 1:
            used = batch.mask > 0
            kept = torch.zeros_like(batch.mask)
            kept[used] = highest_entropy_tokens(batch.entropies[used], quantile).double()
            token_losses = token_losses * kept
        if cap is not None:
            token_losses = token_losses * correction_weights(
                batch.old, batch.sampling, batch.mask, level="token", mode="truncate", lower=0.0, upper=cap
            )
        token_losses = token_losses + beta * k3(policy, batch.ref)
        loss = (token_weights(batch.mask, totals, loss_type) * token_losses).sum()
        loss.backward()
        assert policy.grad is not None
        total += loss.item()
        gradients.append(policy.grad)
        outputs.append(output)
    return total, gradients, outputs


def assert_same(ours: tuple[float, list[torch.Tensor], Any], theirs: tuple[float, list[torch.Tensor], Any]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-12)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-11, atol=1e-15)
    assert all(gradient.abs().max() > 0 for gradient in ours[1])


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_one_micro_batch(trl_grpo: ModuleType, loss_type: str, beta: float, on_policy: bool) -> None:
    for seed in range(5):
        batches = [Batch(seed)]
        assert_same(
            our_losses(batches, loss_type, beta, on_policy), trl_losses(trl_grpo, batches, loss_type, beta, on_policy)
        )


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_accumulated_over_equal_micro_batches(trl_grpo: ModuleType, loss_type: str, beta: float) -> None:
    batches = [Batch(seed) for seed in (10, 11, 12)]
    assert_same(our_losses(batches, loss_type, beta), trl_losses(trl_grpo, batches, loss_type, beta))


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo", "dr_grpo"])
def test_masked_completions_where_trl_counts_the_tokens_left_or_all_completions(
    trl_grpo: ModuleType, loss_type: str
) -> None:
    batch = Batch(20)
    batch.mask[2] = 0.0
    assert_same(our_losses([batch], loss_type, 0.04), trl_losses(trl_grpo, [batch], loss_type, 0.04))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("delta", [None, 1.5])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_levels_and_dual_clip(trl_grpo: ModuleType, loss_type: str, delta: float | None, level: str) -> None:
    for seed in range(5):
        batch = Batch(seed)
        batch.policy += 0.6  # ratios over delta
        options: dict[str, Any] = {"level": level, "delta": delta}
        ours = our_losses([batch], loss_type, 0.04, **options)
        assert_same(ours, trl_losses(trl_grpo, [batch], loss_type, 0.04, **options))
        assert delta is None or ours[2][0].clipped_delta.any()


def test_gspo_is_trls_grpo_of_sequences(trl_grpo: ModuleType) -> None:
    for seed in range(5):
        assert_same(
            our_losses([Batch(seed)], "gspo", 0.0),
            trl_losses(trl_grpo, [Batch(seed)], "grpo", 0.0, level="sequence"),
        )


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_truncated_importance_sampling(trl_grpo: ModuleType, loss_type: str) -> None:
    for seed in range(5):
        batch = Batch(seed)
        assert (torch.exp(batch.old - batch.sampling) > 1.2).any()
        ours = our_losses([batch], loss_type, 0.04, cap=1.2)
        assert_same(ours, trl_losses(trl_grpo, [batch], loss_type, 0.04, cap=1.2))
        assert ours[0] != our_losses([batch], loss_type, 0.04)[0]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_the_tokens_of_the_highest_entropy(trl_grpo: ModuleType, loss_type: str) -> None:
    # TRL interpolates the threshold between two tokens, which makes one token more or less at most: none at 0.5 of an
    # even number.
    for seed in range(8):
        batch = Batch(seed)
        if batch.mask.sum() % 2:
            continue
        ours = our_losses([batch], loss_type, 0.04, quantile=0.5)
        theirs = trl_losses(trl_grpo, [batch], loss_type, 0.04, quantile=0.5)
        assert ours[0] == pytest.approx(theirs[0], rel=1e-12)
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-11, atol=1e-15)
        assert ours[0] != our_losses([batch], loss_type, 0.04)[0]


def test_bnpo_is_dapo_under_one_denominator_and_not_trls(trl_grpo: ModuleType) -> None:
    # The documented difference: TRL weighs micro-batches alike, however many tokens they hold.
    batches = [Batch(30), Batch(31)]
    ours = our_losses(batches, "bnpo", 0.0)[0]
    assert ours == pytest.approx(trl_losses(trl_grpo, batches, "dapo", 0.0)[0], rel=1e-12)
    assert ours != pytest.approx(trl_losses(trl_grpo, batches, "bnpo", 0.0)[0], rel=1e-6)


def test_kl_and_clip_metrics(trl_grpo: ModuleType) -> None:
    batch = Batch(40, num_completions=30)
    _, _, metrics = trl_losses(trl_grpo, [batch], "dapo", 0.04)
    _, _, (output,) = our_losses([batch], "dapo", 0.04)

    def token_mean(values: torch.Tensor) -> float:
        return ((values * batch.mask).sum() / batch.mask.sum()).item()

    low, high = token_mean(output.clipped_low), token_mean(output.clipped_high)
    assert min(low, high) > 0.05
    # TRL counts in float32.
    assert metrics["clip_ratio/low_mean"] == [pytest.approx(low, rel=1e-6)]
    assert metrics["clip_ratio/high_mean"] == [pytest.approx(high, rel=1e-6)]
    assert metrics["clip_ratio/region_mean"] == [pytest.approx(low + high, rel=1e-6)]
    assert metrics["kl"] == [pytest.approx(token_mean(k3(batch.policy, batch.ref)), rel=1e-12)]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(trl_grpo: ModuleType, scale: Literal["group", "batch", "none"]) -> None:
    # TRL computes them in the middle of a method that generates too: those lines alone are run.
    source = inspect.getsource(trl_grpo.GRPOTrainer._generate_and_score_completions)
    start, end = "# Compute grouped-wise rewards", "# Slice to keep only the local part"
    assert source.count(start) == source.count(end) == 1
    lines = "        " + source[source.index(start) : source.index(end)]
    for seed in range(10):
        rewards = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).round(
            decimals=1
        )
        rewards[2] = 0.5
        names: dict[str, Any] = {
            "self": SimpleNamespace(num_generations=4, scale_rewards=scale),
            "rewards": rewards.flatten(),
        }
        exec(textwrap.dedent(lines), {"torch": torch}, names)
        theirs = names["advantages"].view(5, 4)
        torch.testing.assert_close(group_advantages(rewards, scale), theirs, rtol=1e-12, atol=1e-14)


def test_advantages_with_rewards_that_do_not_apply(trl_grpo: ModuleType) -> None:
    # TRL counts them as 0 in the group; its own deviation without NaNs is what it logs.
    rewards = torch.tensor([1.0, torch.nan, 0.25, 3.0, torch.nan], dtype=torch.float64)
    expected = (rewards - rewards.nanmean()) / (trl_grpo.nanstd(rewards) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards.unsqueeze(0), "group")[0], expected.nan_to_num(nan=0.0))
