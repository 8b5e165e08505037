"""The canary: is what the engine sampled from really the trainer's policy?

The largest class of silent failures in this field is rollouts from another model than the one that trains: an adapter
never delivered, delivered twice, scaled wrongly, answered from a stale cache. All of them show in one number: the
difference between the engine's and the trainer's log-probability of the very tokens that were sampled.
"""

from collections.abc import Sequence

import torch

from .types import RolloutGroup


# Measured in float32 with vLLM 0.23 on the CPU: a sound engine differs from the trainer by 5e-6 nats a token on
# average (SmolLM2-135M; 2e-6 on a tiny model), a base model that answers in place of the adapter by 2e-3 after a
# single update, and each fault injected in tests/engines by 0.4 and more. Half precision rounds logits in both
# engines: its bounds have not been measured on a GPU (docs/gpu.md).
DEFAULT_BOUNDS = {torch.float32: 2e-4, torch.float16: 0.02, torch.bfloat16: 0.05}

# bitsandbytes rounds activations to 8 bits too (on a CPU in evaluation alone), and vLLM, which gets the weights
# dequantized, does not: 0.026 on a tiny random model. With 4 bits the weights alone are rounded, and nothing differs.
BOUND_IN_8_BITS = 0.1


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
        f"engine and the trainer; the bound is {bound:.2g} (`max_sampling_logprob_diff`). The completions come from "
        "another policy than the one that is trained: an adapter that was not delivered, or not as it is, another "
        "precision, or another temperature. Training on them would teach the wrong thing, so the run is stopped. "
        "Try `rollout_backend: hf`; if that is quiet, please report the model and the vLLM version. Raise the bound "
        "only if you know why the two engines differ, for example a quantised engine."
    )
