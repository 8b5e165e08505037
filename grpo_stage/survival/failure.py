"""How a run of several processes ends when one of them fails: that one is named last, and the others end with it.

torchrun ends the other processes once one has failed, and then prints a summary of the failures. It takes for the
cause what has failed first, and shows the error that was written to the file in `TORCHELASTIC_ERROR_FILE`.
"""

import faulthandler
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo_stage.survival.stop import leave
from grpo_stage.survival.watchdog import HangError


GRACE_S = 5.0
"""How long a process that another one has left waits to be ended by the launcher, which looks ten times a second."""
EXIT_S = 20.0
"""How long a failed process may take to exit. Until then the launcher and the others wait for it."""


@contextmanager
def failures_reported() -> Iterator[None]:
    """Have an error of the block reach torchrun's summary, unless it comes from the loss of another process."""
    try:
        yield
    except (Exception, HangError) as error:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            if is_of_communication(error):
                _wait_for_the_end(error)
            faulthandler.dump_traceback_later(EXIT_S, exit=True)
        report(error)
        raise


def report(error: BaseException) -> None:
    """Write an error where torchrun looks for it, if torchrun has started this process."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        text = "".join(traceback.format_exception_only(error)).strip()
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}  # the names are torch's
        Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}), encoding="utf-8")


def is_of_communication(error: BaseException) -> bool:
    """Whether an error says that another process could not be reached: by its type, or in gloo's words."""
    from torch.distributed import DistError  # this module is imported before torch

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def _wait_for_the_end(error: BaseException) -> None:
    """Let the launcher see first the process that is the cause. Returns if nobody ends this one."""
    leave()  # the launcher's signal needs no words
    rank, said = os.environ.get("RANK", "0"), str(error).splitlines()[0]
    print(f"Rank {rank} ends, since it has lost another rank, whose failure is the cause: {said}", file=sys.stderr)
    sys.stderr.flush()
    time.sleep(GRACE_S)
