"""Seeds of the random numbers that a reward function draws."""

import hashlib
import random
import sys
from array import array
from collections.abc import Sequence


def batch_seed(completion_ids: Sequence[Sequence[int]]) -> int:
    """A seed that depends on the completions alone, so that a resumed run draws the same numbers."""
    digest = hashlib.sha256()
    for ids in completion_ids:
        digest.update(len(ids).to_bytes(8, "little") + array("q", ids).tobytes())
    return int.from_bytes(digest.digest()[:8], "little")


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python and, where they are loaded, of numpy and torch."""
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed % 2**32)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)
