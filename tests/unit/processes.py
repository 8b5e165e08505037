"""Whether processes that a test has started are still there."""

import time
from pathlib import Path


def is_running(pid: int) -> bool:
    """A zombie is not: only its exit code is left."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int], seconds: float) -> list[int]:
    """Those of the processes that are left after so long."""
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left
