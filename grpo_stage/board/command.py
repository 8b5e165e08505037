"""The command that LLaMA Board shows and runs, for `stage: grpo`: nothing dropped, everything quoted."""

import json
import shlex
from typing import Any

import wrapt

from grpo_stage.board.tables import fenced
from grpo_stage.host.configuration_file import STAGE


@wrapt.decorator
def keep_false(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments that the host runs. The host drops False and empty text as well; in this stage only `null`."""
    arguments: dict[str, Any] = args[0] if args else kwargs["args"]
    if arguments.get("stage") != STAGE:
        return wrapped(*args, **kwargs)
    return {key: value for key, value in arguments.items() if value is not None}


@wrapt.decorator
def quote(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> str:
    """The command as Markdown; pasted into a shell it starts the same run as the Board."""
    arguments: dict[str, Any] = args[0] if args else kwargs["args"]
    if arguments.get("stage") != STAGE:
        return wrapped(*args, **kwargs)
    words = [_flag(key, value) for key, value in arguments.items() if value is not None]
    command = " \\\n    ".join(["llamafactory-cli train", *words])
    return fenced(command, "bash")


def _flag(key: str, value: Any) -> str:
    if isinstance(value, list | tuple) and (len(value) != 1 or "," not in str(value[0])):
        return f"--{key} {shlex.join(map(str, value))}"
    if isinstance(value, dict | list | tuple):  # text would be split at its commas
        text = json.dumps(value, ensure_ascii=False)
    else:
        text = str(value).lower() if isinstance(value, bool) else str(value)
    # A value that looks like a flag would be read as one.
    return f"--{key}={shlex.quote(text)}" if text.startswith("--") else f"--{key} {shlex.quote(text)}"
