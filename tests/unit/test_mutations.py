"""Each line of the mathematics broken on purpose: the oracle must notice, or it proves nothing."""

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from grpo_stage.algorithm import advantages, kl, losses


# By its path: tests are no package, and under importlib mode none can import another.
_spec = importlib.util.spec_from_file_location("oracle", Path(__file__).with_name("test_algorithm_oracle.py"))
assert _spec is not None
assert _spec.loader is not None
oracle = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracle)

CHECKS: dict[ModuleType, Callable[[ModuleType], None]] = {
    advantages: oracle.check_advantages,
    kl: oracle.check_kl,
    losses: oracle.check_losses,
}

MUTATIONS: list[tuple[str, ModuleType, str, str]] = [
    ("advantage: sign", advantages, "rewards - rewards.nanmean", "-rewards + rewards.nanmean"),
    ("advantage: mean over prompts", advantages, "nanmean(dim=1, keepdim=True)", "nanmean(dim=0, keepdim=True)"),
    ("advantage: mean of the batch", advantages, "nanmean(dim=1, keepdim=True)", "nanmean()"),
    ("advantage: no baseline", advantages, "rewards - rewards.nanmean(dim=1, keepdim=True)", "rewards"),
    ("advantage: another constant", advantages, "STD_EPS = 1e-4", "STD_EPS = 1e-6"),
    (
        "advantage: no constant, group",
        advantages,
        "(_nanstd(rewards, dim=1).unsqueeze(1) + STD_EPS)",
        "_nanstd(rewards, dim=1).unsqueeze(1)",
    ),
    (
        "advantage: no constant, batch",
        advantages,
        "(_nanstd(rewards.flatten(), dim=0) + STD_EPS)",
        "_nanstd(rewards.flatten(), dim=0)",
    ),
    ("advantage: deviation without Bessel", advantages, "(count - 1).clamp(min=1)", "count"),
    (
        "advantage: variance for deviation",
        advantages,
        "torch.zeros_like(squares)).sqrt()",
        "torch.zeros_like(squares))",
    ),
    ("advantage: group and batch swapped", advantages, 'scale_rewards == "group"', 'scale_rewards == "batch"'),
    ("advantage: none divides too", advantages, 'elif scale_rewards == "batch":', "else:"),
    (
        "advantage: equal rewards not zeroed",
        advantages,
        "has_reward_variance(rewards).unsqueeze(1)",
        "(rewards == rewards).any(dim=1, keepdim=True)",
    ),
    (
        "advantage: not applicable is 0",
        advantages,
        "    centred = rewards - ",
        "    rewards = rewards.nan_to_num(nan=0.0)\n    centred = rewards - ",
    ),
    (
        "advantage: not applicable stays NaN",
        advantages,
        "return torch.where(rewards.isnan(), torch.zeros_like(centred), centred)",
        "return centred",
    ),
    (
        "advantage: variance where not applicable",
        advantages,
        "nan_to_num(nan=-torch.inf)",
        "nan_to_num(nan=torch.inf)",
    ),
    ("k3: direction", kl, "ref_logprobs - policy_logprobs", "policy_logprobs - ref_logprobs"),
    ("k3: sign of the control variate", kl, "(log_ratio) - log_ratio", "(log_ratio) + log_ratio"),
    ("k3: k1 instead", kl, "torch.expm1(log_ratio) - log_ratio", "-log_ratio"),
    ("k3: k2 instead", kl, "torch.expm1(log_ratio) - log_ratio", "log_ratio.square() / 2"),
    ("k3: without the one", kl, "torch.expm1", "torch.exp"),
    ("k3: no gradient", kl, "ref_logprobs - policy_logprobs", "ref_logprobs - policy_logprobs.detach()"),
    ("loss: sign", losses, "token_losses=-torch", "token_losses=torch"),
    ("loss: max", losses, "torch.minimum", "torch.maximum"),
    ("loss: never clipped", losses, "clipped * advantages", "ratios * advantages"),
    ("loss: always clipped", losses, "(ratios * advantages, clipped", "(clipped * advantages, clipped"),
    ("loss: bounds swapped", losses, "clamp(1 - epsilon, 1 + epsilon_high)", "clamp(1 - epsilon_high, 1 + epsilon)"),
    ("loss: one epsilon", losses, "clamp(1 - epsilon, 1 + epsilon_high)", "clamp(1 - epsilon, 1 + epsilon)"),
    ("loss: ratio turned over", losses, "policy_logprobs - old_logprobs", "old_logprobs - policy_logprobs"),
    (
        "loss: log-ratio for ratio",
        losses,
        "torch.exp(policy_logprobs - old_logprobs)",
        "1 + policy_logprobs - old_logprobs",
    ),
    (
        "loss: ratio without gradient",
        losses,
        "policy_logprobs - old_logprobs",
        "policy_logprobs.detach() - old_logprobs",
    ),
    (
        "loss: magnitude of the advantage",
        losses,
        "advantages = advantages.unsqueeze(1)",
        "advantages = advantages.abs().unsqueeze(1)",
    ),
    ("flag: low on any sign", losses, "(ratios < 1 - epsilon) & (advantages < 0)", "(ratios < 1 - epsilon)"),
    (
        "flag: high on any sign",
        losses,
        "(ratios > 1 + epsilon_high) & (advantages > 0)",
        "(ratios > 1 + epsilon_high)",
    ),
    ("flag: high at the lower range", losses, "ratios > 1 + epsilon_high", "ratios > 1 + epsilon"),
    ("weights: mask dropped", losses, "mask * LOSS_AVERAGES", "(mask * 0 + 1) * LOSS_AVERAGES"),
    (
        "weights: lengths over the wrong axis",
        losses,
        "mask.sum(dim=1)",
        "mask.sum(dim=0)[: len(mask)].mean().expand(len(mask))",
    ),
    ("weights: padded lengths", losses, "mask.sum(dim=1)", "(mask * 0 + 1).sum(dim=1)"),
    ("grpo: local number of completions", losses, "totals.num_completions * lengths", "len(lengths) * lengths"),
    ("grpo: length forgotten", losses, "(totals.num_completions * lengths)", "(totals.num_completions * lengths**0)"),
    ("dapo: local number of tokens", losses, "1.0 / totals.num_tokens)", "1.0 / lengths.sum().item())"),
    ("dapo: completions for tokens", losses, "1.0 / totals.num_tokens)", "1.0 / totals.num_completions)"),
    (
        "dr_grpo: local number of completions",
        losses,
        "totals.num_completions * totals.max_completion_length",
        "len(lengths) * totals.max_completion_length",
    ),
    (
        "dr_grpo: longest seen",
        losses,
        "totals.num_completions * totals.max_completion_length",
        "totals.num_completions * lengths.max().item()",
    ),
    ("bnpo: mean over completions", losses, '"bnpo": _dapo', '"bnpo": _grpo'),
    ("loss types swapped", losses, '"dapo": _dapo', '"dapo": _dr_grpo'),
]


def load(module: ModuleType, source: str) -> ModuleType:
    mutant = ModuleType(f"{module.__name__}_mutant")
    exec(compile(source, mutant.__name__, "exec"), mutant.__dict__)
    return mutant


@pytest.mark.parametrize("module", CHECKS, ids=lambda module: module.__name__)
def test_an_unbroken_copy_passes(module: ModuleType) -> None:
    CHECKS[module](load(module, inspect.getsource(module)))


@pytest.mark.parametrize(("module", "old", "new"), [row[1:] for row in MUTATIONS], ids=[row[0] for row in MUTATIONS])
def test_the_oracle_notices(module: ModuleType, old: str, new: str) -> None:
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} is not exactly once in {module.__name__}: bring the table up to date"
    with pytest.raises(AssertionError):
        CHECKS[module](load(module, source.replace(old, new)))
