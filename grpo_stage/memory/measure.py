"""What a real run holds: the peak of each phase, and the bytes of each part, on the device where it trains."""

import ctypes
import gc
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from grpo_stage.memory.sizes import sizes_of
from grpo_stage.rollout.engines.hf import HFEngine
from grpo_stage.trainer import GRPOTrainer
from grpo_stage.types import Step
from grpo_stage.update.reference import InitialWeightsReference, ModelReference


OPTIMIZER, BETWEEN = "optimizer", "between"
"""The time from an update's end to the step's end, and all that is in no phase."""


class Meter:
    """The most that is held in each phase, bytes: on CUDA what PyTorch has allocated, on a CPU the resident size of
    the process, of which Linux keeps the peak.
    """

    def __init__(self, device_type: str) -> None:
        self.peaks: dict[str, int] = {}
        self._on_cuda = device_type == "cuda"
        self._phase = BETWEEN
        gc.collect()
        if not self._on_cuda:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.process = self.now()
        """What is held beside the run: on a CPU the interpreter, its libraries and the dataset."""
        self._begin_anew()

    def enter(self, name: str) -> None:
        """End the present phase, and begin another."""
        self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), self._peak())
        self._phase = name
        self._begin_anew()

    def leave_out_what_is_no_tensor(self, num_bytes: int) -> None:
        """Begin with the phases of a step, when the run is loaded and holds tensors of so many bytes."""
        if not self._on_cuda:
            self.process = self.now() - num_bytes
        self._begin_anew()
        self.peaks.clear()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A block that is a phase; what follows an update is the optimizer's."""
        self.enter(name)
        try:
            yield
        finally:
            self.enter(OPTIMIZER if name.startswith("update") else BETWEEN)

    def now(self) -> int:
        """Bytes that are held at present."""
        return torch.cuda.memory_allocated() if self._on_cuda else _status("VmRSS")

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self._on_cuda else _status("VmHWM")

    def _begin_anew(self) -> None:
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _status(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    assert match is not None, f"/proc/self/status has no {name}"
    return 1024 * int(match[1])


class MeasuredTrainer(GRPOTrainer):
    """A trainer whose phases are measured. It saves nothing, and need not learn anything."""

    def __init__(self, *, meter: Meter, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.meter = meter
        self.parts: dict[str, int] = {"reference": bytes_of_reference(self.reference)}
        """Bytes of tensors that were counted one by one."""
        self.lengths: list[tuple[int, int]] = []
        """Of prompt and completion of each sample that was trained on."""
        for parameter in self.model.parameters():
            parameter.detach().sum()  # a file that is mapped takes no memory until it is read
        if isinstance(kwargs["engine"], HFEngine):  # another engine's tensors are not known
            weights = sum(p.nbytes for p in self.model.parameters())
            meter.leave_out_what_is_no_tensor(weights + self.parts["reference"])
        self.phases.observe = meter.phase
        self._learn = self.learner.learn
        self.learner.learn = self.learn  # type: ignore[method-assign]
        self.add_callback(_Boundaries(self))

    def learn(self, model: nn.Module, step: Step, global_step: int) -> torch.Tensor:
        """The learner's update."""
        self.lengths = [(len(each.prompt.token_ids), len(each.completion.token_ids)) for each in step.samples]
        loss = self._learn(model, step, global_step)
        self.parts["gradients"] = _bytes(p.grad for p in self.model.parameters() if p.grad is not None)
        return loss

    def states(self) -> Iterator[Mapping[str, Any]]:
        """The states of all optimizers, by weight."""
        assert self.optimizer is not None
        yield from getattr(self.optimizer, "optimizer", self.optimizer).state.values()

    def count(self) -> None:
        """Note the parts that a step leaves."""
        sizes = sizes_of(self.model)
        self.parts |= {
            "weights, frozen": int(sizes.frozen),
            "weights, trained": int(sizes.trained),
            "adapters": int(sizes.adapters),
            "optimizer": _bytes(
                value for state in self.states() for value in state.values() if isinstance(value, torch.Tensor)
            ),
        }

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the weights are those of a measurement."""

    def check_learned(self, num_steps: int) -> None:
        """Nothing: a measurement need not."""


class _Boundaries(TrainerCallback):
    def __init__(self, trainer: MeasuredTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.count()
        self._trainer.meter.enter(BETWEEN)


def bytes_of_reference(reference: Any) -> int:
    """Of the tensors that a reference policy holds beside the policy."""
    if isinstance(reference, InitialWeightsReference | ModelReference):
        return _bytes(reference.state_dict().values())
    return 0


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)
