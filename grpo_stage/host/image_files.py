"""The images of dataset rows: read once, while prompts are made, and refused where they are missing or broken."""

import base64
import hashlib
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from grpo_stage.types import Prompt


def as_json(image: Any) -> dict[str, str | None]:
    """An image as the host takes it (a path, bytes, both as a mapping, or PIL's) for JSON: its `path` and `data`.

    Raises:
        ValueError: if it is none of these.
    """
    path: str | None = None
    data: bytes | None = None
    if isinstance(image, str):
        path = image
    elif isinstance(image, bytes):
        data = image
    elif isinstance(image, dict) and {"path", "bytes"} & image.keys():
        path, data = image.get("path"), image.get("bytes")
    elif isinstance(image, Image.Image):
        file = io.BytesIO()
        image.save(file, format="PNG")  # loses nothing of what was decoded
        path, data = getattr(image, "filename", None) or None, file.getvalue()
    if path is None and data is None:
        raise ValueError(f"an image is a path, or what `datasets` decodes as one, got {type(image).__name__}")
    return {"path": path, "data": None if data is None else base64.b64encode(data).decode()}


def read(image: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """The content of an image that `as_json` gave, and the image with its hash and size.

    Raises:
        ValueError: if it is missing, or cannot be decoded.
    """
    path, data = image["path"], image["data"]
    try:
        content = Path(path).read_bytes() if data is None else base64.b64decode(data)
        Image.open(io.BytesIO(content)).load()
    except FileNotFoundError as error:
        raise ValueError(
            f"there is no file {path} (relative paths begin in `media_dir`, which is `dataset_dir` unless it is given)"
        ) from error
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason = str(error).split(" <_io", maxsplit=1)[0]  # PIL shows the object that it reads from
        raise ValueError(f"{path or 'an image that the dataset holds'} cannot be read: {reason}") from error
    return content, {**image, "sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}


def refuse_changed(prompts: Iterable[Prompt]) -> None:
    """Refuse images that are not there any more, or have another size: prompts may come from a cache.

    Raises:
        ValueError: naming the file.
    """
    seen = {image.path: image for prompt in prompts for image in prompt.images if image.data is None}
    for path, image in seen.items():
        assert path is not None
        size = os.path.getsize(path) if os.path.isfile(path) else None
        if size != image.num_bytes:
            now = "is not there any more" if size is None else f"has {size} bytes now and had {image.num_bytes}"
            raise ValueError(
                f"The image {path} {now}: the prompts that `datasets` keeps were made of another one. "
                "Bring it back, or write `overwrite_cache: true`."
            )
