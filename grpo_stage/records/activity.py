"""What a run is doing now, and how it ended, in a file of its output folder.

The log begins with the first step; this file begins with the run. Whoever watches a run learns from it what is being
prepared and for how long, that an evaluation is under way, and the error that ended the run.
"""

import contextlib
import json
import logging
import os
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from grpo_stage.survival.stop import RunStopped


logger = logging.getLogger(f"llamafactory.{__name__}")  # below the host's, whose handlers show it

ACTIVITY_FILE = "_grpo_stage_activity.json"
"""Names with a `_` in front are not pushed to the hub."""
Preparing = Literal["data", "model", "reference", "reward_model", "engine"]
Doing = Literal[Preparing, "training", "evaluation", "saving", "stopping"]
End = Literal["finished", "stopped", "failed"]
_MAX_CHARACTERS = 20_000


class Activity:
    """Notes what a run does. A file that cannot be written is a warning, given once.

    Args:
        folder: the run's output folder; None notes nothing, as on ranks that do not save.
    """

    def __init__(self, folder: str | None) -> None:
        self._path = None if folder is None else Path(folder, ACTIVITY_FILE)
        self._name = ""
        self._since = time.time()
        self._done: list[tuple[str, float]] = []

    def begin(self, name: Doing | End, **more: Any) -> None:
        """Note that the run does this from now on; `more` is noted beside it."""
        now = time.time()
        if self._name and self._name != "training":
            self._done = [*self._done[-20:], (self._name, round(now - self._since, 1))]
        self._name, self._since = name, now
        if self._path is None:
            return
        unfinished = self._path.with_name(f".{ACTIVITY_FILE}.{os.getpid()}.tmp")
        noted = {"activity": name, "since": now, "done": self._done, **more}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps(noted), encoding="utf-8")
            os.replace(unfinished, self._path)
        except OSError as error:
            logger.warning(f"{self._path} cannot be written ({error}): the run goes on, and nobody sees what it does.")
            self._path = None

    @contextlib.contextmanager
    def during(self, name: Doing) -> Iterator[None]:
        """Note that the run does this in the block, and after it what it did before."""
        before = self._name
        self.begin(name)
        yield
        self.begin(before)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def until_its_end(self) -> Iterator[None]:
        """The block that is the run: how it ends is noted."""
        try:
            yield
        except RunStopped as stop:
            self.begin("stopped", error=str(stop), checkpoint=stop.checkpoint)
            raise
        except BaseException as error:
            text = str(error).strip() or type(error).__name__
            self.begin(
                "failed",
                error=text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"[:_MAX_CHARACTERS],
                log=traceback.format_exc()[-_MAX_CHARACTERS:],
            )
            raise
        self.begin("finished")
