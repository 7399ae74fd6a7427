"""Seeds made by hashing names and numbers, so that similar inputs give unrelated
seeds.
"""

from __future__ import annotations

import hashlib

import numpy as np


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed from parts such as (seed, rank, step)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def image_seed(seed: int, prompt_index: int, image_index: int) -> int:
    """The 63-bit seed of one picture.

    It does not depend on the model, so compared models get the same random numbers.
    """
    state = np.random.SeedSequence((seed, prompt_index, image_index)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def generator_for(seed: int, key: str) -> np.random.Generator:
    """Random numbers of one item; they do not depend on the order of the items."""
    return np.random.default_rng([seed, int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")])


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed that torch's generators do not take."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; expected 0 or more, and less than 2^63")
