"""The processes below a process, found in /proc; on a system without /proc none are found."""

import os
import signal
from contextlib import suppress
from pathlib import Path


def descendants_of(pid: int) -> list[int]:
    """Running children, their children and so on, in whatever session or group they are."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended in between
            # pid (name) state parent ...; a name may hold anything, parentheses included
            state, parent = entry.read_bytes().rpartition(b")")[2].split()[:2]
            if state not in (b"Z", b"X"):
                children.setdefault(int(parent), []).append(int(entry.parent.name))
    found = list(children.get(pid, ()))
    for each in found:  # the list grows during the loop
        found += children.get(each, ())
    return found


def kill_descendants(pid: int) -> bool:
    """Send SIGKILL to all of them that belong to this user. Returns False if there were none."""
    num_killed = 0
    for each in descendants_of(pid):
        with suppress(OSError):  # it has ended, or runs with another user's rights (`sudo`)
            os.kill(each, signal.SIGKILL)
            num_killed += 1
    return num_killed > 0
