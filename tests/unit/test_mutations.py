"""Each line of the mathematics broken on purpose: the oracle must notice, or it proves nothing."""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import grpo_stage.records.metrics
import grpo_stage.update.gradient
import grpo_stage.update.objective
from grpo_stage.algorithm import advantages, correction, exploration, kl, losses, ratios


def oracle_of(file: str) -> ModuleType:
    """By its path: tests are no package, and under importlib mode none can import another."""
    spec = importlib.util.spec_from_file_location(file.removesuffix(".py"), Path(__file__).with_name(file))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look themselves up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


oracle, objective = oracle_of("test_algorithm_oracle.py"), oracle_of("test_objective_oracle.py")
terms, overflow = oracle_of("test_objective_terms.py"), oracle_of("test_ratio_overflow.py")
of_rollouts = oracle_of("test_metrics.py")

CHECKS: dict[ModuleType, tuple[Callable[[ModuleType], None], ...]] = {
    advantages: (oracle.check_advantages, objective.check_advantages),
    correction: (objective.check_correction,),
    exploration: (objective.check_exploration,),
    kl: (oracle.check_kl, objective.check_kl, overflow.check_divergences),
    losses: (oracle.check_losses, objective.check_losses, overflow.check_surrogates),
    ratios: (overflow.check_bound,),
    grpo_stage.records.metrics: (of_rollouts.check_rollout,),
    grpo_stage.update.objective: (
        terms.check_penalty_and_state,
        terms.check_selection,
        terms.check_adaptation,
        terms.check_token_losses,
    ),
    grpo_stage.update.gradient: (terms.check_gradient,),
}

# What `Objective` and `PolicyGradient` make of the formulas: name, old, new.
OF_THE_OBJECTIVE: list[tuple[str, str, str]] = [
    # The settings.
    ("loss_type: ignored", "LOSSES[args.loss_type]", 'LOSSES["dapo"]'),
    ("epsilon: ignored", "epsilon=args.epsilon,", "epsilon=0.2,"),
    ("epsilon_high: ignored", "args.epsilon if args.epsilon_high is None else args.epsilon_high", "args.epsilon"),
    ("epsilon_high: DAPO's", "args.epsilon if args.epsilon_high is None", "0.28 if args.epsilon_high is None"),
    ("delta: ignored", "delta=args.delta", "delta=None"),
    ("level: ignored", "level=args.importance_sampling_level", 'level="token"'),
    (
        "sapo: pos for neg",
        "sapo_temperature_neg=args.sapo_temperature_neg",
        "sapo_temperature_neg=args.sapo_temperature_pos",
    ),
    (
        "sapo: neg for pos",
        "sapo_temperature_pos=args.sapo_temperature_pos",
        "sapo_temperature_pos=args.sapo_temperature_neg",
    ),
    # What is added up.
    ("old: the present", "TokenInputs(logprobs, old_logprobs,", "TokenInputs(logprobs, logprobs.detach(),"),
    ("factors: dropped", "losses = losses * factor", "losses = losses * factor**0"),
    (
        "factors: on the KL as well",
        "self.beta * self._kl_loss(logprobs, old_logprobs, ref_logprobs)",
        "self.beta * self._kl_loss(logprobs, old_logprobs, ref_logprobs)"
        " * sum(self._policy_factors(batch, logprobs.detach(), old_logprobs, MetricTracker()), start=0 * losses)",
    ),
    ("learned: dropped", "losses = losses * learned", "losses = losses * 1"),
    ("learned: inverted", "losses = losses * learned", "losses = losses * (1 - learned)"),
    (
        "learned: the KL as well",
        "losses + self.beta * self._kl_loss",
        "losses + (1 if learned is None else learned) * self.beta * self._kl_loss",
    ),
    (
        "learned: the entropy as well",
        "self.entropy_coef * entropy",
        "(1 if learned is None else learned) * self.entropy_coef * entropy",
    ),
    ("held: sign", "losses + self._args.kl_cov_coef", "losses - self._args.kl_cov_coef"),
    ("held: no coefficient", "self._args.kl_cov_coef * held", "held"),
    ("held: all tokens", "kl_cov_coef * held", "kl_cov_coef * held**0"),
    ("held: of either sign", "(logprobs - old_logprobs).abs()", "(logprobs - old_logprobs)"),
    ("held: no gradient", "(logprobs - old_logprobs).abs()", "(logprobs.detach() - old_logprobs).abs()"),
    (
        "held: no policy's loss",
        "losses = losses + self._args.kl_cov",
        "losses = losses * (1 - held) + self._args.kl_cov",
    ),
    ("entropy: sign", "losses - self.entropy_coef * entropy", "losses + self.entropy_coef * entropy"),
    ("entropy: no gradient", "self.entropy_coef * entropy", "self.entropy_coef * entropy.detach()"),
    ("entropy: coefficient of the start", "losses - self.entropy_coef *", "losses - self._args.entropy_coef *"),
    ("entropy: never paid", "if self.pays_entropy:", "if False:"),
    (
        "entropy: not paid with a target alone",
        "args.entropy_coef > 0 or args.entropy_target is not None",
        "args.entropy_coef > 0",
    ),
    ("KL: sign", "losses + self.beta *", "losses - self.beta *"),
    ("KL: no coefficient", "losses + self.beta * self", "losses + self"),
    ("KL: coefficient of the start", "losses + self.beta *", "losses + self._args.beta *"),
    ("KL: in the reward and the loss", "if not self._args.kl_in_reward:", "if True:"),
    ("KL: always k3", "KL_ESTIMATORS[self._args.kl_estimator](logprobs", "k3(logprobs"),
    ("KL: direction", "kl_estimator](logprobs, ref_logprobs)", "kl_estimator](ref_logprobs, logprobs)"),
    ("KL: of the old policy", "kl_estimator](logprobs, ref_logprobs)", "kl_estimator](old_logprobs, ref_logprobs)"),
    ("KL: never corrected", "if self._args.use_bias_correction_kl else kl", "if False else kl"),
    ("KL: always corrected", "if self._args.use_bias_correction_kl else kl", "if True else kl"),
    (
        "KL: corrected by the reference",
        "bias_corrected(kl, logprobs, old_logprobs)",
        "bias_corrected(kl, logprobs, logprobs.detach())",
    ),
    (
        "metric: the kl of the loss",
        "kl = k3(logprobs, ref_logprobs)\n",
        "kl = self._kl_loss(logprobs, old_logprobs, ref_logprobs)\n",
    ),
    (
        "metric: entropy of all tokens",
        "record_update(metrics, batch, surrogate, entropy.detach(), kl)",
        "record_update(metrics, batch, surrogate, entropy.detach() * 2, kl)",
    ),
    ("metric: tokens that the loss leaves out", "(learned * used).sum()", "learned.sum()"),
    ("metric: held", "(held * used).sum()", "(used - held * used).sum()"),
    # The factors.
    ("correction: never", 'if args.rollout_correction != "none":', "if False:"),
    (
        "correction: of the present policy",
        "correction_weights(\n                old_logprobs,",
        "correction_weights(\n                logprobs,",
    ),
    ("correction: level", "level=args.rollout_correction,", 'level="token",'),
    ("correction: mode", "mode=args.rollout_correction_mode", 'mode="truncate"'),
    ("correction: no lower bound", "lower=args.rollout_correction_min", "lower=0.0"),
    ("correction: no upper bound", "upper=args.rollout_correction_max", "upper=torch.inf"),
    ("correction: metric", "(weights <= args.rollout_correction_min) | ", ""),
    ("off-policy: inverted", "factors.append(kept)", "factors.append(1 - kept)"),
    (
        "off-policy: of the old policy",
        "off_policy_mask(\n                logprobs,",
        "off_policy_mask(\n                old_logprobs,",
    ),
    ("off-policy: threshold", "                args.off_policy_mask_threshold,\n", "                0.0,\n"),
    ("off-policy: metric", "((1 - kept) * completions).sum()", "(1 - kept).sum()"),
    # The choice of tokens.
    ("select: not for the quantile", "self._args.top_entropy_quantile < 1 or", "False or"),
    ("select: not for the covariance", ' or self._args.covariance_control != "none"\n', "\n"),
    ("select: what is left out counts", "len(tokens) if is_used else 0", "len(tokens)"),
    ("select: of this rank alone", "ranks = all_gather(mine)", "ranks = [mine] * len(all_gather(mine))"),
    ("select: another rank's", "ranks[: process_index()]", "ranks[: process_index() - 1]"),
    (
        "quantile: of the log-probabilities",
        "highest_entropy_tokens(all_entropies,",
        "highest_entropy_tokens(all_logprobs,",
    ),
    ("quantile: the others", "learned &= highest_entropy_tokens", "learned &= ~highest_entropy_tokens"),
    ("covariance: of the entropy", "token_covariances(all_logprobs,", "token_covariances(all_entropies,"),
    ("clip_cov: the others", "learned &= ~clip_cov_tokens", "learned &= clip_cov_tokens"),
    ("clip_cov: the quantile forgotten", "learned &= ~clip_cov_tokens", "learned = ~clip_cov_tokens"),
    ("clip_cov: bounds", "self._args.clip_cov_min, self._args.clip_cov_max", "0.0, self._args.clip_cov_max"),
    ("clip_cov: the same draw in each step", '{seed} {step} {key}"', '{seed} {key}"'),
    ("clip_cov: the same draw for each seed", '{seed} {step} {key}"', '{step} {key}"'),
    ("clip_cov: step and seed run together", '{seed} {step} {key}"', '{seed + step} {key}"'),
    ("clip_cov: the same draw for each completion", '{seed} {step} {key}"', '{seed} {step}"'),
    ("clip_cov: by the place of a completion", '{seed} {step} {key}"', '{seed} {step} {keys.index(key)}"'),
    ("kl_cov: not learned from", "held = kl_cov_tokens", "learned &= ~kl_cov_tokens"),
    (
        "kl_cov: share",
        "kl_cov_tokens(covariances, self._args.covariance_frac, draws)",
        "kl_cov_tokens(covariances, 0.5, draws)",
    ),
    (
        "kl_cov: ties by position",
        "kl_cov_tokens(covariances, self._args.covariance_frac, draws)",
        "kl_cov_tokens(covariances, self._args.covariance_frac, torch.arange(len(draws)))",
    ),
    # What adapts.
    ("gate: open before anything was measured", "args.entropy_target is None  # a", "True  # a"),
    ("gate: removed", "self._entropy_coef if self._is_entropy_low else 0.0", "self._entropy_coef"),
    ("gate: inverted", "if self._is_entropy_low else 0.0", "if not self._is_entropy_low else 0.0"),
    ("gate: never closes", "self._is_entropy_low = entropy <= args.entropy_target", "self._is_entropy_low = True"),
    ("gate: closes at the target", "entropy <= args.entropy_target", "entropy < args.entropy_target"),
    (
        "adapt: mean of this rank",
        "for state in all_gather(metrics.state_dict())",
        "for state in all_gather(metrics.state_dict())[:1]",
    ),
    (
        "adapt: mean of the ranks' means",
        "sum(total for total, _ in measured) / count",
        "sum(t / n for t, n in measured if n) / sum(n > 0 for _, n in measured)",
    ),
    ("adapt: beta by the entropy", '_mean_over_ranks(metrics, "kl")', '_mean_over_ranks(metrics, "entropy")'),
    ("adapt: the entropy's by the kl", '_mean_over_ranks(metrics, "entropy")', '_mean_over_ranks(metrics, "kl")'),
    ("adapt: from the beta of the start", "adapted_coefficient(self.beta, kl", "adapted_coefficient(args.beta, kl"),
    (
        "adapt: from the coefficient that is paid",
        "                    self._entropy_coef, entropy,",
        "                    self.entropy_coef, entropy,",
    ),
    ("adapt: never beta", "if args.kl_target is not None:", "if False:"),
    (
        "adapt: never the entropy's",
        "        if args.entropy_target is not None:\n            metrics",
        "        if False:\n            metrics",
    ),
    ("metric: beta of the start", 'metrics.add("beta", self.beta)', 'metrics.add("beta", args.beta)'),
    (
        "metric: the coefficient, paid or not",
        'metrics.add("entropy_coef", self.entropy_coef)',
        'metrics.add("entropy_coef", self._entropy_coef)',
    ),
    ("state: beta of the start", '"beta": self.beta,', '"beta": self._args.beta,'),
    ("state: what is paid", '"entropy_coef": self._entropy_coef,', '"entropy_coef": self.entropy_coef,'),
    ("state: the gate forgotten", '"is_entropy_low": self._is_entropy_low,', '"is_entropy_low": True,'),
    ("state: beta not loaded", 'self.beta = state["beta"]', "pass"),
    ("penalty: no coefficient", "self.beta * estimate(policy", "estimate(policy"),
    ("penalty: sign", "self.beta * estimate(policy", "-self.beta * estimate(policy"),
    ("penalty: mean over tokens", "ref.double()).sum().item()", "ref.double()).mean().item()"),
    ("penalty: always k3", "estimate = KL_ESTIMATORS[self._args.kl_estimator]", "estimate = k3"),
]
OF_THE_GRADIENT: list[tuple[str, str, str]] = [
    ("weights: dropped", "(batch.loss_weights * token_losses).sum()", "(batch.completion_mask * token_losses).sum()"),
    (
        "old: always the present",
        "logprobs.detach() if data.old_logprobs is None else _padded(data.old_logprobs, batch)",
        "logprobs.detach()",
    ),
    ("old: none on-policy", "old = logprobs.detach() if", "old = logprobs.detach() * 0 if"),
    ("reference: none", "None if data.ref_logprobs is None else _padded(data.ref_logprobs, batch)", "None"),
    ("reference: the old policy", "_padded(data.ref_logprobs, batch)", "old"),
    ("learned and held swapped", "metrics, learned, held)", "metrics, held, learned)"),
    (
        "learned: dropped",
        "learned = None if selection is None else _padded(selection.learned, batch)",
        "learned = None",
    ),
    ("held: dropped", "held = None if selection is None else _padded(selection.held, batch)", "held = None"),
    ("selection: never", "if self.objective.selects else None", "if False else None"),
    ("selection: truncated ones count", "scored.used(masks)", "scored.used(False)"),
    ("selection: no advantages", "[advantage for scored in data.groups for", "[0.0 for scored in data.groups for"),
    ("entropy: no gradient", "entropy_gradient=self.objective.pays_entropy", "entropy_gradient=False"),
    (
        "temperature: ignored",
        "                self._sampling.temperature,\n                with_entropy=True",
        "                1.0,\n                with_entropy=True",
    ),
    (
        "totals: truncated ones count",
        "count_totals(groups, self._sampling.max_new_tokens, self._grpo_args.mask_truncated_completions)",
        "count_totals(groups, self._sampling.max_new_tokens, False)",
    ),
    ("rows: not as in the micro-batch", "enumerate(batch.rows)", "enumerate(sorted(batch.rows))"),
    ("loss: of the last micro-batch", "loss += micro_loss.detach()", "loss = micro_loss.detach()"),
]

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
    ("advantage: deviation without Bessel", advantages, "squares / (count - 1).clamp(min=1)", "squares / count"),
    (
        "advantage: variance for deviation",
        advantages,
        "torch.zeros_like(squares)).sqrt()",
        "torch.zeros_like(squares))",
    ),
    (
        "advantage: the batch's deviation for the group's",
        advantages,
        "(_nanstd(rewards, dim=1).unsqueeze(1) + STD_EPS)\n    if",
        "(_nanstd(rewards.flatten(), dim=0) + STD_EPS)\n    if",
    ),
    (
        "advantage: none divides too",
        advantages,
        'if scale_rewards == "none":\n        return advantages',
        'if scale_rewards == "none":\n        return advantages / 2',
    ),
    (
        "advantage: equal rewards not zeroed",
        advantages,
        "has_reward_variance(rewards).unsqueeze(1) & ",
        "",
    ),
    ("equal rewards: bit by bit", advantages, "REWARD_TOLERANCE = 1e-9", "REWARD_TOLERANCE = 0.0"),
    ("equal rewards: an absolute tolerance", advantages, "torch.maximum(sizes[:, 1:], sizes[:, :-1])", "1.0"),
    (
        "equal rewards: beside the sum alone",
        advantages,
        "rewards.abs() if addends is None else torch.maximum(rewards.abs(), addends)",
        "rewards.abs()",
    ),
    ("equal rewards: all of a group", advantages, "is_new |= ordered[:, 1:].isnan()", "is_new &= False"),
    (
        "applied: all are compared",
        advantages,
        "applies = ~self.parts.isnan() & (self.weights != 0)",
        "applies = torch.zeros_like(self.parts, dtype=torch.bool)",
    ),
    (
        "applied: a weight of 0 keeps apart",
        advantages,
        "applies = ~self.parts.isnan() & (self.weights != 0)",
        "applies = ~self.parts.isnan()",
    ),
    (
        "applied: how many, and not which",
        advantages,
        "applies.flatten(0, 1).unique(",
        "applies.sum(-1, keepdim=True).flatten(0, 1).unique(",
    ),
    (
        "applied: parts of all",
        advantages,
        "parts=parts.masked_fill(absent.unsqueeze(-1), torch.nan)",
        "parts=parts",
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
        " & ~rewards.isnan()\n    return torch",
        "\n    return torch",
    ),
    (
        "advantage: variance where not applicable",
        advantages,
        "highest = rewards.nan_to_num(nan=-torch.inf)",
        "highest = rewards.nan_to_num(nan=torch.inf)",
    ),
    ("k3: direction", kl, "ref_logprobs - policy_logprobs", "policy_logprobs - ref_logprobs"),
    ("k3: sign of the control variate", kl, "(log_ratio)) - log_ratio", "(log_ratio)) + log_ratio"),
    ("k3: k1 instead", kl, "torch.expm1(bounded(log_ratio)) - log_ratio", "-log_ratio"),
    ("k3: k2 instead", kl, "torch.expm1(bounded(log_ratio)) - log_ratio", "log_ratio.square() / 2"),
    ("k3: without the one", kl, "torch.expm1", "torch.exp"),
    ("k3: no gradient", kl, "ref_logprobs - policy_logprobs", "ref_logprobs - policy_logprobs.detach()"),
    ("loss: sign", losses, "token_losses=-torch", "token_losses=torch"),
    ("loss: max", losses, "torch.minimum", "torch.maximum"),
    ("loss: never clipped", losses, "clipped * advantages", "ratios * advantages"),
    ("loss: always clipped", losses, "(bounded * advantages, clipped", "(clipped * advantages, clipped"),
    ("loss: bounds swapped", losses, "clamp(1 - epsilon, 1 + epsilon_high)", "clamp(1 - epsilon_high, 1 + epsilon)"),
    ("loss: one epsilon", losses, "clamp(1 - epsilon, 1 + epsilon_high)", "clamp(1 - epsilon, 1 + epsilon)"),
    (
        "loss: ratio turned over",
        losses,
        '"token":\n        return torch.exp(bounded(policy_logprobs - old_logprobs))',
        '"token":\n        return torch.exp(bounded(old_logprobs - policy_logprobs))',
    ),
    (
        "loss: log-ratio for ratio",
        losses,
        '"token":\n        return torch.exp(bounded(policy_logprobs - old_logprobs))',
        '"token":\n        return 1 + policy_logprobs - old_logprobs',
    ),
    (
        "loss: ratio without gradient",
        losses,
        '"token":\n        return torch.exp(bounded(policy_logprobs',
        '"token":\n        return torch.exp(bounded(policy_logprobs.detach()',
    ),
    (
        "loss: not bounded",
        losses,
        "torch.exp(bounded(policy_logprobs - old_logprobs))",
        "torch.exp(policy_logprobs - old_logprobs)",
    ),
    (
        "sequence: not bounded",
        losses,
        "bounded(_mean_over_tokens(policy_logprobs - old_logprobs, mask))",
        "_mean_over_tokens(policy_logprobs - old_logprobs, mask)",
    ),
    ("gmpo: not bounded", losses, "bounded(_mean_over_tokens(kept, mask))", "_mean_over_tokens(kept, mask)"),
    ("k3: not bounded", kl, "torch.expm1(bounded(log_ratio))", "torch.expm1(log_ratio)"),
    (
        "correction of the KL: not bounded",
        kl,
        "torch.exp(bounded(policy_logprobs - old_logprobs)) * kl",
        "torch.exp(policy_logprobs - old_logprobs) * kl",
    ),
    (
        "bound: ends the gradient",
        ratios,
        "log_ratios.clamp(max=limit).detach() + (log_ratios - log_ratios.detach())",
        "log_ratios.clamp(max=limit)",
    ),
    ("bound: float32's for all", ratios, "torch.finfo(log_ratios.dtype)", "torch.finfo(torch.float32)"),
    ("bound: no headroom", ratios, "HEADROOM = 8.0", "HEADROOM = 0.0"),
    (
        "loss: magnitude of the advantage",
        losses,
        "advantages = _by_token(advantages)\n    clipped",
        "advantages = _by_token(advantages.abs())\n    clipped",
    ),
    ("flag: low on any sign", losses, "(ratios < 1 - epsilon) & (advantages < 0)", "(ratios < 1 - epsilon)"),
    (
        "flag: high on any sign",
        losses,
        "(ratios > 1 + epsilon_high) & (advantages > 0)",
        "(ratios > 1 + epsilon_high)",
    ),
    (
        "flag: high at the lower range",
        losses,
        "(ratios > 1 + epsilon_high) & (advantages > 0)",
        "(ratios > 1 + epsilon) & (advantages > 0)",
    ),
    ("weights: mask dropped", losses, "return mask * AVERAGES", "return (mask * 0 + 1) * AVERAGES"),
    (
        "weights: lengths over the wrong axis",
        losses,
        "lengths = mask.sum(dim=1)",
        "lengths = mask.sum(dim=0)[: len(mask)].mean().expand(len(mask))",
    ),
    ("weights: padded lengths", losses, "lengths = mask.sum(dim=1)", "lengths = (mask * 0 + 1).sum(dim=1)"),
    ("grpo: local number of completions", losses, "totals.num_completions * lengths", "len(lengths) * lengths"),
    ("grpo: length forgotten", losses, "(totals.num_completions * lengths)", "(totals.num_completions * lengths**0)"),
    ("dapo: local number of tokens", losses, "1.0 / totals.num_tokens)", "1.0 / lengths.sum().item())"),
    ("dapo: completions for tokens", losses, "1.0 / totals.num_tokens)", "1.0 / totals.num_completions)"),
    (
        "dr_grpo: local number of completions",
        losses,
        "num_sampled * totals.max_completion_length",
        "len(lengths) * totals.max_completion_length",
    ),
    (
        "dr_grpo: longest seen",
        losses,
        "num_sampled * totals.max_completion_length",
        "num_sampled * lengths.max().item()",
    ),
    (
        "dr_grpo: what is masked changes the constant",
        losses,
        "totals.num_completions + totals.num_left_out",
        "totals.num_completions",
    ),
    (
        "loss types swapped",
        losses,
        '"dapo": Loss(_clipped, "token_mean")',
        '"dapo": Loss(_clipped, "seq_mean_token_sum_norm")',
    ),
    # The other losses.
    ("sequence: product instead of mean", losses, "/ mask.sum(dim=1, keepdim=True).clamp(min=1)", "/ 1.0"),
    ("sequence: mask dropped", losses, "(values * mask).sum(dim=1, keepdim=True)", "values.sum(dim=1, keepdim=True)"),
    ("sequence_token: gradient of the sequence", losses, "ratios.detach() * torch.exp", "ratios * torch.exp"),
    (
        "sequence_token: no gradient",
        losses,
        "ratios.detach() * torch.exp(policy_logprobs - policy_logprobs.detach())",
        "ratios.detach() + 0 * policy_logprobs",
    ),
    ("level: not passed on", losses, "level=settings.importance_sampling_level", 'level="token"'),
    ("delta: ignored", losses, "ratios if delta is None else ratios.clamp(max=delta)", "ratios"),
    ("delta: a lower bound", losses, "ratios.clamp(max=delta)", "ratios.clamp(min=delta)"),
    ("delta: flag on any sign", losses, "(ratios > delta) & (advantages < 0)", "ratios > delta"),
    ("delta: not passed on", losses, "delta=settings.delta", "delta=None"),
    ("cispo: sign", losses, "token_losses=-weights * _by_token", "token_losses=weights * _by_token"),
    (
        "cispo: clipped from below",
        losses,
        "weights = ratios.clamp(max=1 + epsilon_high)",
        "weights = ratios.clamp(1 - epsilon_high, 1 + epsilon_high)",
    ),
    (
        "cispo: TRL's bound",
        losses,
        "weights = ratios.clamp(max=1 + epsilon_high)",
        "weights = ratios.clamp(max=epsilon_high)",
    ),
    (
        "cispo: gradient through the weight",
        losses,
        "importance_ratios(policy_logprobs, old_logprobs).detach()  # [B, T]",
        "importance_ratios(policy_logprobs, old_logprobs)",
    ),
    ("cispo: mean over completions", losses, 'Loss(_cispo, "token_mean")', 'Loss(_cispo, "seq_mean_token_mean")'),
    ("sapo: sign", losses, "token_losses=-gates * advantages, ", "token_losses=gates * advantages, "),
    ("sapo: one temperature", losses, ".masked_fill(advantages > 0, temperature_pos)", ""),
    ("sapo: temperatures swapped", losses, "masked_fill(advantages > 0", "masked_fill(advantages < 0"),
    ("sapo: gate not scaled", losses, "4 / temperatures * torch.sigmoid", "torch.sigmoid"),
    ("sapo: gate at ratio 0", losses, "temperatures * (ratios - 1)", "temperatures * ratios"),
    (
        "gmpo: sign",
        losses,
        "token_losses=-ratios * advantages,\n        ratios=ratios,\n        clipped_low=(log",
        "token_losses=ratios * advantages,\n        ratios=ratios,\n        clipped_low=(log",
    ),
    (
        "gmpo: bounds swapped",
        losses,
        "torch.where(advantages > 0, log_ratios.clamp(max=epsilon_high), log_ratios.clamp(min=-epsilon))",
        "torch.where(advantages > 0, log_ratios.clamp(max=epsilon), log_ratios.clamp(min=-epsilon_high))",
    ),
    (
        "gmpo: both bounds for both signs",
        losses,
        "torch.where(advantages > 0, log_ratios.clamp(max=epsilon_high), log_ratios.clamp(min=-epsilon))",
        "log_ratios.clamp(-epsilon, epsilon_high)",
    ),
    (
        "gmpo: arithmetic mean",
        losses,
        "torch.exp(bounded(_mean_over_tokens(kept, mask)))",
        "_mean_over_tokens(kept.exp(), mask)",
    ),
    ("gmpo: padding counted", losses, "_mean_over_tokens(kept, mask)", "_mean_over_tokens(kept, mask * 0 + 1)"),
    # The other estimators.
    ("rloo: no correction", advantages, " * (count / (count - 1).clamp(min=1))", ""),
    ("rloo: turned over", advantages, "(count / (count - 1).clamp(min=1))", "((count - 1) / count)"),
    (
        "reinforce++: the group's",
        advantages,
        "partial(_compared_in_batch, lambda table, _: whitened",
        "partial(_compared, lambda table, _: whitened",
    ),
    (
        "reinforce++ baseline: deviation of the rewards",
        advantages,
        'return _whitened(group_advantages(rewards, "none"), ~rewards.isnan())',
        'return group_advantages(rewards, "batch")',
    ),
    ("whitening: what does not apply counts", advantages, "torch.where(counts, centred, torch.nan)", "centred"),
    (
        "whitening: no constant",
        advantages,
        ".flatten(), dim=0) + STD_EPS)\n\n\ndef _nanstd",
        ".flatten(), dim=0))\n\n\ndef _nanstd",
    ),
    ("gdpo: weights ignored", advantages, "weight * group_advantages(part", "group_advantages(part"),
    ("gdpo: not normalised", advantages, 'group_advantages(part, "group")', 'group_advantages(part, "none")'),
    (
        "gdpo: not whitened",
        advantages,
        "return _whitened(sums, counts)",
        "return sums",
    ),
    (
        "gdpo: what cancels is noise",
        advantages,
        "sums = torch.where(sums.abs() > REWARD_TOLERANCE * parts.abs().sum(dim=0), sums, torch.zeros_like(sums))",
        "",
    ),
    ("gdpo: a weight of 0 counts", advantages, "~rewards.isnan() & (weights != 0)", "~rewards.isnan()"),
    ("passk: all that lead", advantages, "known == best.unsqueeze(1)", "known >= second.unsqueeze(1)"),
    ("passk: sign", advantages, "best - second", "second - best"),
    ("passk: the best itself", advantages, "best - second", "best"),
    ("opo: plain mean", advantages, "lengths.to(rewards.dtype))", "torch.ones_like(rewards))"),
    (
        "opo: what does not apply has a length",
        advantages,
        "known = torch.where(rewards.isnan(), torch.zeros_like(rewards), lengths.to(rewards.dtype))",
        "known = lengths.to(rewards.dtype)",
    ),
    # The divergence.
    ("k1: direction", kl, "return policy_logprobs - ref_logprobs", "return ref_logprobs - policy_logprobs"),
    ("k2: without the half", kl, "0.5 * (policy", "(policy"),
    ("correction of the KL: none", kl, "torch.exp(bounded(policy_logprobs - old_logprobs)) * kl", "kl"),
    (
        "correction of the KL: no gradient",
        kl,
        "torch.exp(bounded(policy_logprobs - old_logprobs)) * kl",
        "torch.exp(bounded(policy_logprobs - old_logprobs)).detach() * kl",
    ),
    (
        "correction of the KL: turned over",
        kl,
        "torch.exp(bounded(policy_logprobs - old_logprobs)) * kl",
        "torch.exp(bounded(old_logprobs - policy_logprobs)) * kl",
    ),
    ("adaptive: the wrong way", kl, "(1 + 0.1 * min", "(1 - 0.1 * min"),
    ("adaptive: not bounded", kl, "min(max(kl / target - 1, -0.2), 0.2)", "(kl / target - 1)"),
    # The correction of the rollout.
    (
        "rollout: turned over",
        correction,
        "(old_logprobs - sampling_logprobs) * mask  # [B, T]",
        "(sampling_logprobs - old_logprobs) * mask",
    ),
    (
        "rollout: mask dropped",
        correction,
        "(old_logprobs - sampling_logprobs) * mask  # [B, T]",
        "(old_logprobs - sampling_logprobs)",
    ),
    (
        "rollout: mean of the sequence",
        correction,
        "log_ratios.sum(dim=1, keepdim=True)",
        "log_ratios.mean(dim=1, keepdim=True)",
    ),
    ("rollout: bounds swapped", correction, "weights.clamp(lower, upper)", "weights.clamp(upper, lower)"),
    ("rollout: no lower bound", correction, "(weights >= lower) & ", ""),
    ("rollout: no upper bound", correction, " & (weights <= upper)", ""),
    ("rollout: kept as 1", correction, "weights, torch.zeros_like(weights))", "weights, torch.ones_like(weights))"),
    ("off-policy: good ones too", correction, "(advantages < 0) & ", ""),
    ("off-policy: the other way", correction, "drift > threshold", "drift < threshold"),
    (
        "off-policy: direction",
        correction,
        "(sampling_logprobs - policy_logprobs)",
        "(policy_logprobs - sampling_logprobs)",
    ),
    ("off-policy: sum for mean", correction, " / mask.sum(dim=1).clamp(min=1)", ""),
    (
        "off-policy: mask dropped",
        correction,
        "((sampling_logprobs - policy_logprobs) * mask)",
        "(sampling_logprobs - policy_logprobs)",
    ),
    # Exploration.
    ("quantile: the lowest", exploration, "entropies >= entropies", "entropies <= entropies"),
    (
        "quantile: rounded down",
        exploration,
        "max(1, -int(-quantile * len(entropies) // 1))",
        "max(1, int(quantile * len(entropies)))",
    ),
    ("covariance: sign", exploration, "return centered[0] * centered[1]", "return -centered[0] * centered[1]"),
    ("covariance: not centered", exploration, " - math.fsum(values.tolist()) / max(1, len(values))", ""),
    ("clip_cov: no lower bound", exploration, "(covariances >= lower) & ", ""),
    ("clip_cov: no upper bound", exploration, " & (covariances <= upper)", ""),
    (
        "clip_cov: the first ones",
        exploration,
        "_order(draws[candidates], -covariances[candidates])",
        "torch.arange(len(candidates))",
    ),
    ("clip_cov: draws of others", exploration, "draws[candidates]", "draws[: len(candidates)]"),
    ("clip_cov: the highest", exploration, "_order(draws[candidates], ", "_order(-draws[candidates], "),
    ("clip_cov: all of them", exploration, "candidates[order[: _number(fraction, len(covariances))]]", "candidates"),
    ("kl_cov: the lowest", exploration, "_order(-covariances, draws)", "_order(covariances, draws)"),
    ("kl_cov: ties by the highest draw", exploration, "_order(-covariances, draws)", "_order(-covariances, -draws)"),
    ("kl_cov: by the draws first", exploration, "_order(-covariances, draws)", "_order(draws, -covariances)"),
    (
        "adaptive entropy: the wrong way",
        exploration,
        "delta if entropy <= target else -delta",
        "-delta if entropy <= target else delta",
    ),
    (
        "adaptive entropy: not bounded",
        exploration,
        "max(coefficient + (delta if entropy <= target else -delta), 0.0)",
        "(coefficient + (delta if entropy <= target else -delta))",
    ),
    # What is logged of a rollout.
    (
        "reward_std: the population's",
        grpo_stage.records.metrics,
        'tracker.add("reward_std", stdev(totals))',
        'tracker.add("reward_std", stdev(totals) * ((len(totals) - 1) / len(totals)) ** 0.5)',
    ),
    (
        "std of a function: the population's",
        grpo_stage.records.metrics,
        "stdev(applicable))",
        "stdev(applicable) * ((len(applicable) - 1) / len(applicable)) ** 0.5)",
    ),
    (
        "std of a function: of this rank",
        grpo_stage.records.metrics,
        "in all_gather([row for scored in groups for row in scored.rewards]) for",
        "in all_gather([row for scored in groups for row in scored.rewards])[:1] for",
    ),
    (
        "no reward: an equal one",
        grpo_stage.records.metrics,
        "float(not scored.has_reward)",
        "float(scored.has_reward)",
    ),
    (
        "zero deviation: a weight of 0 has a say",
        grpo_stage.records.metrics,
        "has_reward_variance(scored, weights)",
        "has_reward_variance(scored, [1.0] * len(weights))",
    ),
    *((f"objective, {name}", grpo_stage.update.objective, old, new) for name, old, new in OF_THE_OBJECTIVE),
    *((f"gradient, {name}", grpo_stage.update.gradient, old, new) for name, old, new in OF_THE_GRADIENT),
]


def load(module: ModuleType, source: str) -> ModuleType:
    mutant = ModuleType(f"{module.__name__}_mutant")
    mutant.__package__ = module.__package__
    exec(compile(source, mutant.__name__, "exec"), mutant.__dict__)
    return mutant


def run_checks(module: ModuleType, mutant: ModuleType) -> None:
    for check in CHECKS[module]:
        check(mutant)


@pytest.mark.parametrize("module", CHECKS, ids=lambda module: module.__name__)
def test_an_unbroken_copy_passes(module: ModuleType) -> None:
    run_checks(module, load(module, inspect.getsource(module)))


@pytest.mark.parametrize(("module", "old", "new"), [row[1:] for row in MUTATIONS], ids=[row[0] for row in MUTATIONS])
def test_the_oracle_notices(module: ModuleType, old: str, new: str) -> None:
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} is not exactly once in {module.__name__}: bring the table up to date"
    mutant = load(module, source.replace(old, new))
    with pytest.raises(AssertionError):
        run_checks(module, mutant)
