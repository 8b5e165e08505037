"""Seconds and memory of a run on transformers' Trainer, ours or another, by the same definitions."""

import ctypes
import gc
import json
import re
import threading
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from transformers import TrainerCallback


SAMPLING_S = 0.005


class ProcessMemory:
    """The most that this process held above what it held at the construction: Linux can begin its peak anew."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed, but is still resident, would be no growth later
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        self._before = _status_kib("VmRSS")

    def peak_gib(self) -> float:
        return (_status_kib("VmHWM") - self._before) / 2**20


class CardMemory:
    """The same of everything on the card, engine included, as the driver counts it every few milliseconds."""

    def __init__(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        self._before = self._peak = _used_bytes()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def peak_gib(self) -> float:
        """Ends the measurement."""
        self._over.set()
        self._thread.join()
        return (self._peak - self._before) / 2**30

    def _watch(self) -> None:
        while not self._over.wait(SAMPLING_S):
            self._peak = max(self._peak, _used_bytes())


def _status_kib(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    assert match is not None
    return int(match[1])


def _used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def now() -> float:
    """Seconds, once the card has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measured_run(owner: type, rollout: str, folder: Path, on_cuda: bool) -> TrainerCallback:
    """A callback that writes what a run took to `folder`; the method `rollout` of `owner` samples and scores."""
    callback, inner = _Measured(folder / "result.json", on_cuda), getattr(owner, rollout)

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = now()
        outputs = inner(*args, **kwargs)
        callback.rollouts.append(now() - started)
        return outputs

    setattr(owner, rollout, timed)
    return callback


class _Measured(TrainerCallback):
    def __init__(self, file: Path, on_cuda: bool) -> None:
        self.rollouts: list[float] = []
        self._file = file
        self._on_cuda = on_cuda
        self._started = 0.0
        self._steps: list[float] = []
        self._lengths: list[float] = []

    def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
        for parameter in model.parameters():
            parameter.detach().sum()  # a file that is mapped takes no memory until it is read
        self._memory = CardMemory() if self._on_cuda else ProcessMemory()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._steps.append(now() - self._started)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "completions/mean_length" in logs:
            self._lengths.append(logs["completions/mean_length"])

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """The first step warms up."""
        updates = [step - rollout for step, rollout in zip(self._steps, self.rollouts, strict=True)]
        result = {
            "step_s": median(self._steps[1:]),
            "rollout_s": median(self.rollouts[1:]),
            "update_s": median(updates[1:]),
            "peak_gib_above_model": self._memory.peak_gib(),
            "mean_length": fmean(self._lengths[1:]),
            "first_step_s": self._steps[0],
        }
        if self._on_cuda:
            result["peak_gib_allocated"] = torch.cuda.max_memory_allocated() / 2**30  # by torch, model included
        self._file.write_text(json.dumps(result), encoding="utf-8")
