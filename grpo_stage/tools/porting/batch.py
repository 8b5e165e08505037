"""Batches: other systems count completions or count per rollout, this stage counts prompts of an optimizer step."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Batch:
    """The batch of a recipe of ours."""

    per_device_train_batch_size: int
    """Prompts of an optimizer step on a device; the gradient accumulation steps are 1."""
    steps_per_generation: int
    note: str
    is_exact: bool
    """Whether it is the batch of the other recipe."""

    @property
    def keys(self) -> dict[str, int]:
        return {
            "per_device_train_batch_size": self.per_device_train_batch_size,
            "gradient_accumulation_steps": 1,
            "steps_per_generation": self.steps_per_generation,
        }


def of_completions(
    per_device: int,
    accumulation: int,
    group_size: int,
    devices: int,
    our_devices: int,
    micro_steps_per_generation: int | None = None,
    generation_batch_size: int | None = None,
) -> Batch:
    """The batch of a recipe that counts completions, as TRL and ms-swift do.

    There, `per_device` completions make a micro-step on a device, `accumulation` micro-steps an optimizer step, and a
    rollout feeds `micro_steps_per_generation` micro-steps (as many as an optimizer step has, unless it is given).

    Args:
        per_device: completions of a micro-step on a device.
        accumulation: micro-steps of an optimizer step.
        group_size: completions of a prompt.
        devices: how many devices train there.
        our_devices: how many devices train here.
        micro_steps_per_generation: how many micro-steps a rollout feeds.
        generation_batch_size: completions of a rollout, in the place of the argument before.
    """
    if generation_batch_size is not None:
        micro_steps_per_generation = max(1, generation_batch_size // (per_device * devices))
    micro_steps = accumulation if micro_steps_per_generation is None else micro_steps_per_generation
    completions = per_device * accumulation * devices
    said = f"{per_device} completions x {accumulation} micro-steps x {devices} device(s) are {completions}"
    return _batch(completions / group_size, micro_steps / accumulation, our_devices, f"{said}, {group_size} a prompt")


def of_prompts(rollout: int, mini_batch: int, our_devices: int) -> Batch:
    """The batch of a recipe that counts prompts of a rollout and of an optimizer step, as verl and EasyR1 do."""
    said = f"{rollout} prompts a rollout, {mini_batch} of them an optimizer step, on all devices together"
    return _batch(float(mini_batch), rollout / mini_batch, our_devices, said)


def _batch(prompts: float, steps: float, our_devices: int, said: str) -> Batch:
    share = -(-prompts // our_devices)
    # Several rollouts in one optimizer step come from the same policy, as one larger rollout does.
    num_steps = max(1, int(steps))
    is_exact = share * our_devices == prompts and (steps <= 1 or steps == num_steps)
    note = f"{said}: {prompts:g} prompts an optimizer step, {steps:g} steps a rollout"
    if share * our_devices != prompts:
        note += (
            f"; {prompts:g} prompts are no whole number for each of {our_devices} device(s), so that it is rounded up "
            "(`--source-devices` and `--devices` say how many train there and here)"
        )
    if steps > 1 and steps != num_steps:
        note += f"; rounded down to {num_steps} steps a rollout"
    return Batch(int(share), num_steps, note, is_exact)
