"""The processes below a process, from /proc; where a system has none, there are none to be found."""

import os
import signal
from contextlib import suppress
from pathlib import Path


def descendants_of(pid: int) -> list[int]:
    """Children, their children and so on, whatever their sessions and groups are, but for those that have ended."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended in between
            # pid (name) state parent ...; a name may hold anything, parentheses included
            state, parent = entry.read_bytes().rpartition(b")")[2].split()[:2]
            if state not in (b"Z", b"X"):
                children.setdefault(int(parent), []).append(int(entry.parent.name))
    found = list(children.get(pid, ()))
    for each in found:  # grows as it is walked through
        found += children.get(each, ())
    return found


def kill_descendants(pid: int) -> bool:
    """Send SIGKILL to all that are this user's; False where there were none of those."""
    num_killed = 0
    for each in descendants_of(pid):
        with suppress(OSError):  # it has ended, or runs with another user's rights (`sudo`)
            os.kill(each, signal.SIGKILL)
            num_killed += 1
    return num_killed > 0
