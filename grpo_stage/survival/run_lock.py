"""One run a folder: a lock that ends with its process, however that ends.

A POSIX record lock: unlike a lock of `flock`, forked processes do not inherit it. The system releases it when the
process closes any descriptor of the file, so nothing else in this process may open the file.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path


logger = logging.getLogger(f"llamafactory.{__name__}")  # below the host's, whose handlers show it

LOCK_FILE = "_grpo_stage.lock"
"""Names with a `_` in front are not pushed to the hub."""


@contextlib.contextmanager
def owned(folder: str) -> Iterator[None]:
    """Keep other runs out of `folder` during the block. The folder is made if it is missing.

    Raises:
        ValueError: if another run is in it.
    """
    path = Path(folder, LOCK_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            descriptor = _lock(path)
        except OSError as error:
            logger.warning(
                f"{path} cannot be locked ({error}), as on some network disks. The run goes on. Start no second one "
                "in this folder: the two would delete each other's checkpoints."
            )
        else:
            held.callback(os.close, descriptor)
            held.callback(_remove, path)  # before the release: nobody may lock a vanishing file
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "start": time.strftime("%Y-%m-%d %H:%M:%S")}
            with contextlib.suppress(OSError):  # an earlier owner's file, of another user
                os.truncate(descriptor, 0)
                os.write(descriptor, json.dumps(owner).encode())
        yield


def refuse_used(folder: str) -> None:
    """Refuse a folder that a run in another process owns. For the owner itself this does nothing.

    Raises:
        ValueError: naming that process.
    """
    path = Path(folder, LOCK_FILE)
    if path.exists():
        with contextlib.suppress(OSError):  # `owned` warns of a folder that cannot be locked
            os.close(_lock(path))


def _lock(path: Path) -> int:
    """Lock the file and return its descriptor."""
    while True:
        descriptor, kind = _open(path)
        try:
            fcntl.lockf(descriptor, kind | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except OSError as error:
            owner = b""
            with contextlib.suppress(OSError):  # with mandatory locks only the owner may read
                owner = os.read(descriptor, 1000)
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _used(path.parent, owner) from None
            raise
        os.close(descriptor)  # its owner has ended and removed the file


def _open(path: Path) -> tuple[int, int]:
    """A descriptor of the file, and the kind of lock that it can have."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # another user's file: a shared lock conflicts with the owner's as well
        return os.open(path, os.O_RDONLY), fcntl.LOCK_SH
    with contextlib.suppress(OSError):
        os.fchmod(descriptor, 0o666)  # whatever the umask: other users of the folder have to see the lock
    return descriptor, fcntl.LOCK_EX


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # another user's
        path.unlink()


def _used(folder: Path, owner: bytes) -> ValueError:
    try:
        known = json.loads(owner)
        who = f"process {known['pid']} on {known['host']} has been training in it since {known['start']}"
        remedy = f"wait for that run, or stop it (`kill {known['pid']}` there)"
    except ValueError:  # it is being written
        who, remedy = "another process has just begun to train in it", "wait for that run"
    return ValueError(
        f"`output_dir: {folder}` is in use: {who}. Two runs in one folder would mix their logs and delete each "
        f"other's checkpoints. Choose another `output_dir`, or {remedy}."
    )
