"""The bounds of the host's numbers, as one table; `arguments.py` has those of the stage's own keys.

An upper bound far beyond any use catches typing errors. Unusual values that have a meaning are within bounds:
Prodigy's `learning_rate: 1.0`, `max_grad_norm: 0` for no clipping.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from grpo_stage.algorithm.combinations import ONLY_WITH
from grpo_stage.algorithm.conditions import applies, broken_bound
from grpo_stage.algorithm.refusals import apart


@dataclass(frozen=True, slots=True)
class Bound:
    """What a number of the host may be, and why."""

    limits: Mapping[str, float]
    """`min` and `max` are inclusive, `above` and `below` exclusive."""
    reason: str
    remedy: str
    also: tuple[float, ...] = ()
    """Values beyond the limits that have a meaning of their own."""
    is_share_or_count: bool = False
    """Whether a value below 1 is a share, and one from 1 on a whole number."""

    def broken(self, value: Any) -> str | None:
        """The rule that the value breaks, in words; None if it breaks none."""
        if value in self.also:
            return None
        rule = broken_bound(value, self.limits)
        if rule is None and self.is_share_or_count and isinstance(value, float) and value > 1 and value % 1:
            return "a whole number, or a share below 1"
        return rule


_MOST_TOKENS, _MOST_WORKERS, _MOST_STEPS = 10_000_000, 1024, 10**9
_QUANTITY = {"min": 1, "max": _MOST_STEPS}


def _interval(what: str, remedy: str) -> Bound:
    return Bound(
        {"above": 0, "max": _MOST_STEPS},
        f"it is the number of steps from one {what} to the next, or a share of all steps",
        remedy,
        is_share_or_count=True,
    )


HOST_BOUNDS: Mapping[str, Bound] = MappingProxyType(
    {
        # Sampling
        "temperature": Bound(
            {"above": 0, "min": 0.01, "max": 100},
            "near 0 all completions of a group are equal, and equal completions teach nothing; far above 1 they are "
            "noise",
            "Write `temperature: 1.0` or leave it out.",
        ),
        "top_p": Bound(
            {"above": 0, "max": 1}, "it is a probability", "Leave it out to sample from the policy itself."
        ),
        "top_k": Bound({"min": -1}, "it is the number of tokens kept", "Leave it out, or write 0, to keep all."),
        "repetition_penalty": Bound(
            {"above": 0, "max": 100}, "logits are divided by it", "Leave it out, or write 1.0, for none."
        ),
        "max_new_tokens": Bound(
            {"min": 1, "max": _MOST_TOKENS},
            "it is the room for a completion, in tokens",
            "Write for example `max_new_tokens: 512`.",
        ),
        "cutoff_len": Bound(
            {"min": 1, "max": _MOST_TOKENS},
            "it is the room for a prompt, in tokens",
            "Write for example `cutoff_len: 1024`.",
        ),
        # Length and batch
        "per_device_train_batch_size": Bound(
            {"min": 1, "max": 1_000_000},
            "it counts the prompts of a step on each device",
            "Write for example `per_device_train_batch_size: 8`.",
        ),
        "gradient_accumulation_steps": Bound(
            {"min": 1, "max": 1_000_000}, "it multiplies the prompts of a step", "Leave it out for 1."
        ),
        "max_steps": Bound(
            _QUANTITY,
            "it is the number of optimizer steps",
            "Write that number, or leave it out (or -1) and write `num_train_epochs`.",
            also=(-1,),
        ),
        "num_train_epochs": Bound(
            {"above": 0, "max": 1_000_000},
            "it is how many times the run goes through the dataset, where `max_steps` is not given",
            "Write for example `num_train_epochs: 1.0`.",
        ),
        # Optimization
        "learning_rate": Bound(
            {"above": 0, "max": 100},
            "at 0 nothing is learned, and so large a step destroys the model at once",
            "Write for example `learning_rate: 1.0e-5`.",
        ),
        "weight_decay": Bound(
            {"min": 0, "max": 1000},
            "it is how much weights shrink, and below 0 they would grow",
            "Write for example `weight_decay: 0.01`, or leave it out for 0.",
        ),
        "adam_beta1": Bound(
            {"min": 0, "below": 1}, "it is the share of the old mean that is kept", "Leave it out for 0.9."
        ),
        "adam_beta2": Bound(
            {"min": 0, "below": 1}, "it is the share of the old mean that is kept", "Leave it out for 0.999."
        ),
        "adam_epsilon": Bound({"above": 0, "max": 1000}, "it keeps a division by 0 away", "Leave it out for 1.0e-8."),
        "moe_aux_loss_coef": Bound(
            {"min": 0, "max": 1000},
            "it is the weight of the routers' loss in the step's loss, and below 0 it would drive the load of the "
            "experts apart",
            "Write for example `moe_aux_loss_coef: 0.001`, or leave it out for none.",
        ),
        "max_grad_norm": Bound(
            {"min": 0},
            "it is the norm that a gradient is clipped to",
            "Leave it out for 1.0, or write 0 for no clipping.",
        ),
        "warmup_ratio": Bound(
            {"min": 0, "max": 1},
            "it is the share of all steps in which the learning rate rises",
            "Write for example `warmup_ratio: 0.1`, or leave it out for none.",
        ),
        "warmup_steps": Bound(
            {"min": 0, "max": _MOST_STEPS},
            "it is the number of steps in which the learning rate rises, or their share",
            "Write for example `warmup_steps: 10`, or leave it out for none.",
            is_share_or_count=True,
        ),
        "seed": Bound(
            {"min": 0, "max": 2**32 - 1}, "it is what random numbers start from", "Write for example `seed: 42`."
        ),
        # Adapters
        "lora_rank": Bound(
            {"min": 1, "max": 16_384},
            "it is the number of columns of an adapter's matrices",
            "Write for example `lora_rank: 16`.",
        ),
        "lora_alpha": Bound(
            {"above": 0, "max": 1_000_000},
            "the adapter counts lora_alpha / lora_rank times, and at 0 not at all",
            "Leave it out for twice the rank.",
        ),
        "loraplus_lr_ratio": Bound(
            {"above": 0, "max": 1_000_000},
            "it multiplies the learning rate of an adapter's second matrix",
            "Write for example `loraplus_lr_ratio: 16.0`, or leave it out.",
        ),
        "loraplus_lr_embedding": Bound({"above": 0, "max": 100}, "it is a learning rate", "Leave it out for 1.0e-6."),
        "pissa_iter": Bound(
            {"min": 1, "max": 10_000},
            "it is the number of iterations of the decomposition",
            "Leave it out for 16, or write -1 for an exact decomposition.",
            also=(-1,),
        ),
        # Data
        "max_samples": Bound(
            _QUANTITY, "it is how many rows of each dataset are taken", "Leave it out to take all of them."
        ),
        "val_size": Bound(
            {"min": 0, "max": _MOST_STEPS},
            "it is the number of rows that are held out for evaluation, or their share",
            "Write for example `val_size: 0.1`, or leave it out for none.",
            is_share_or_count=True,
        ),
        "preprocessing_num_workers": Bound(
            {"min": 1, "max": _MOST_WORKERS}, "it is a number of processes", "Leave it out for one."
        ),
        "preprocessing_batch_size": Bound(
            _QUANTITY, "it is how many rows are encoded at once", "Leave it out for 1000."
        ),
        "dataloader_num_workers": Bound(
            {"min": 0, "max": _MOST_WORKERS}, "it is a number of processes", "Leave it out for 0."
        ),
        # Logging, saving, evaluating
        "logging_steps": _interval("line of the log", "Leave it out to log every step."),
        "save_steps": _interval(
            "checkpoint", 'Write for example `save_steps: 100`, or `save_strategy: "no"` for none.'
        ),
        "eval_steps": _interval(
            "evaluation", 'Write for example `eval_steps: 100`, or `eval_strategy: "no"` for none.'
        ),
        "eval_delay": Bound(
            {"min": 0, "max": _MOST_STEPS},
            "it is how many steps or epochs pass before the first evaluation",
            "Leave it out for none.",
        ),
        "save_total_limit": Bound(
            _QUANTITY,
            "it is how many checkpoints are kept",
            'Leave it out to keep all of them; `save_strategy: "no"` saves none.',
        ),
        "early_stopping_steps": Bound(
            _QUANTITY, "it is how many evaluations without a better one end the run", "Leave it out to go on."
        ),
        # Devices
        "ddp_timeout": Bound(
            {"min": 1, "max": 10**9},
            "it is how many seconds devices wait for one another",
            "Leave it out for 1800, or write for example `ddp_timeout: 180000000` to wait as long as it takes.",
        ),
    }
)


def refuse_out_of_bounds(values: Mapping[str, Any]) -> None:
    """Refuse numbers of the host that are out of bounds.

    Args:
        values: every key of the host, defaults included.

    Raises:
        ValueError: naming the key, its value, the rule, the reason and the remedy.
    """
    for key, bound in HOST_BOUNDS.items():
        rule = bound.broken(values[key])
        with apart():
            if rule is not None and applies(ONLY_WITH.get(key, {}), values):
                raise ValueError(f"`{key}: {values[key]}` must be {rule}: {bound.reason}. {bound.remedy}")
