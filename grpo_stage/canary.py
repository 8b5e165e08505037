"""The canary: is what the engine sampled from really the trainer's policy?

The largest class of silent failures in this field is rollouts from another model than the one that trains: an adapter
never delivered, delivered twice, scaled wrongly, answered from a stale cache. All of them show in one number: the
difference between the engine's and the trainer's log-probability of the very tokens that were sampled.
"""

from collections.abc import Sequence

import torch

from .types import RolloutGroup


# Measured on SmolLM2-135M and on a tiny Llama (tests/engines): float32 engines agree within 2e-5 on average, and the
# mildest injected fault is two orders of magnitude above this bound. Half precision rounds logits in both engines; the
# bound there is wider and has not been measured on a GPU (docs/gpu.md).
DEFAULT_BOUNDS = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}


class StaleRolloutError(RuntimeError):
    """The engine sampled from another policy than the trainer's."""


def check_versions(groups: Sequence[RolloutGroup], version: int) -> None:
    """Raise unless every group was sampled from `version`."""
    for group in groups:
        if group.policy_version != version:
            raise StaleRolloutError(
                f"The engine sampled prompt {group.prompt.index} from policy version {group.policy_version}, but the "
                f"trainer is at version {version}: training on it would push the policy the wrong way. The run is "
                "stopped. Resume from the last checkpoint; if it happens again, use `rollout_backend: hf`."
            )


def check_difference(mean: float, bound: float, backend: str) -> None:
    """Raise if the engine's and the trainer's log-probabilities differ by more than `bound` on average.

    Args:
        mean: mean over sampled tokens of |sampling - policy log-probability|, in nats.
        bound: `max_sampling_logprob_diff`.
        backend: the engine's name, for the message.
    """
    if mean <= bound:  # a NaN is not
        return
    raise StaleRolloutError(
        f"The log-probabilities of the sampled tokens differ by {mean:.2g} nats on average between the {backend} "
        f"engine and the trainer; the bound is {bound:.2g} (`max_sampling_logprob_diff`). The completions come "
        "from another policy than the one that is trained: an adapter that was not delivered, or not as it is, another precision, "
        "or another temperature. Training on them would teach the wrong thing, so the run is stopped. "
        "Try `rollout_backend: hf`; if that is quiet, please report the model and the vLLM version. Raise the bound "
        "only if you know why the two engines differ, for example a quantised engine."
    )
