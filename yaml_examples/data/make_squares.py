"""Write squares.jsonl and its images: one to four white squares, and the question how many there are.

python yaml_examples/data/make_squares.py
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw


NUM_ROWS = 64
NUM_CELLS, CELL = 4, 28
"""Cells in a row and in a column, and pixels of a cell: what Qwen's models read as one token."""
MOST = 4


def draw(rng: random.Random, count: int) -> Image.Image:
    """An image of `count` squares, each somewhere in a cell of its own."""
    image = Image.new("RGB", (NUM_CELLS * CELL, NUM_CELLS * CELL), "black")
    for cell in rng.sample(range(NUM_CELLS**2), count):
        size = rng.randrange(16, 23)
        x, y = (CELL * at + rng.randrange(CELL - size) for at in divmod(cell, NUM_CELLS))
        ImageDraw.Draw(image).rectangle((x, y, x + size, y + size), fill="white")
    return image


def write(folder: Path, num_rows: int = NUM_ROWS) -> Iterator[dict[str, Any]]:
    """The rows, whose images are written to `squares/` in `folder`."""
    rng = random.Random(0)
    (folder / "squares").mkdir(parents=True, exist_ok=True)
    for i in range(num_rows):
        count = i % MOST + 1
        name = f"squares/{i:03}.png"
        draw(rng, count).save(folder / name, optimize=True)
        yield {"question": "<image>How many squares?", "answer": str(count), "images": [name]}


if __name__ == "__main__":
    here = Path(__file__).parent
    text = "".join(json.dumps(row) + "\n" for row in write(here))
    (here / "squares.jsonl").write_text(text, encoding="utf-8")
