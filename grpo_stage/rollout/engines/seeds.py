"""Where a sampled token's randomness comes from."""

import hashlib


def sample_seed(run_seed: int, step: int, prompt_index: int, sample: int) -> int:
    """A 63-bit seed from (run seed, step, prompt, sample).

    A hash rather than a sum: with `seed + sample` neighboring prompts would share streams, and the completions of a
    group would not be independent of the next group's.
    """
    key = f"{run_seed}/{step}/{prompt_index}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
