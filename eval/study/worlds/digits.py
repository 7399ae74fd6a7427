"""scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, each pixel drawn two a side; told apart by a small classifier."""

from __future__ import annotations

import numpy as np
from PIL import Image

from eval.study.worlds._classes import Classes

SIZE = 16  # pixels a side of a picture
NUM_VALIDATION = 297


def pictures(seed: int = 0) -> tuple[list[tuple[int, Image.Image]], list[tuple[int, Image.Image]]]:
    """(class, picture) of training and of validation, which share no digit."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = (digits.images * (255 / 16)).round().astype(np.uint8).repeat(2, axis=1).repeat(2, axis=2)
    order = np.random.default_rng(seed).permutation(len(grey))
    drawn = [(int(digits.target[index]), Image.fromarray(grey[index]).convert("RGB")) for index in order]
    return drawn[NUM_VALIDATION:], drawn[:NUM_VALIDATION]


WORLD = Classes("digits", SIZE, [str(number) for number in range(10)], pictures, num_prompts=50)
