"""The memory of each device of this machine, as it is now."""

import shutil
import subprocess
import time
from dataclasses import dataclass
from threading import Lock

import psutil


_KEPT_S = 2.0
_PATIENCE_S = 5.0
_QUERY = "--query-gpu=index,name,memory.used,memory.total"


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or the machine's own memory."""

    name: str
    used: float
    """GiB, by all processes."""
    total: float
    """GiB."""


class Devices:
    """Looks at most every two seconds, however many pages ask."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._seen: list[Device] = []
        self._seen_at = -_KEPT_S

    def now(self) -> list[Device]:
        """The GPUs if `nvidia-smi` knows any, and the machine's memory."""
        with self._lock:
            if time.monotonic() - self._seen_at >= _KEPT_S:
                memory = psutil.virtual_memory()
                own = Device("RAM", (memory.total - memory.available) / 2**30, memory.total / 2**30)
                self._seen = [*_gpus(), own]
                self._seen_at = time.monotonic()
            return self._seen


def _gpus() -> list[Device]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        asked = subprocess.run(
            [program, _QUERY, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=_PATIENCE_S
        )
    except (OSError, subprocess.TimeoutExpired):  # a driver that hangs: the rest of the page is shown without it
        return []
    return gpus_of(asked.stdout) if asked.returncode == 0 else []


def gpus_of(answer: str) -> list[Device]:
    """The GPUs in the answer of `nvidia-smi`, in MiB, a line each; one that cannot tell its memory is left out."""
    found = []
    for line in answer.splitlines():
        index, name, *memory = (part.strip() for part in line.split(","))
        if len(memory) == 2 and all(part.isdecimal() for part in memory):
            found.append(Device(f"{index}: {name}", int(memory[0]) / 1024, int(memory[1]) / 1024))
    return found
