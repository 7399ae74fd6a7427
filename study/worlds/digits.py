"""scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, judged by a small
classifier.

Each digit appears several times, a little turned, moved and scaled: the originals are
so few that a model of half a million parameters memorises them within minutes. Pictures
are enlarged twofold.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from study.worlds._classes import Classes

SIDE = 8
SIZE = 2 * SIDE  # pixels a side of a picture
NUM_VALIDATION = 297  # digits
VARIANTS = (8, 4)  # of each digit of training, and of validation
DEGREES, SHIFT, SCALE = 12, 0.7, 0.1  # maximal rotation, shift in pixels, change in size (share)


def pictures(seed: int = 0) -> tuple[list[tuple[int, Image.Image]], list[tuple[int, Image.Image]]]:
    """(class, picture) of training and of validation, which share no digit."""
    from sklearn.datasets import load_digits

    digits, rng = load_digits(), np.random.default_rng(seed)
    shuffled = rng.permutation(len(digits.images))
    grey = (digits.images * (255 / 16)).round().astype(np.uint8)
    return tuple(
        [(int(digits.target[index]), varied(grey[index], rng)) for index in indices for _ in range(variants)]
        for indices, variants in zip(
            (shuffled[NUM_VALIDATION:], shuffled[:NUM_VALIDATION]), VARIANTS, strict=True
        )
    )


def varied(grey: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """A digit [8, 8] uint8 as RGB of SIZE, randomly turned, moved and scaled."""
    angle, scale = np.radians(rng.uniform(-DEGREES, DEGREES)), 1 + rng.uniform(-SCALE, SCALE)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    centre = np.full(2, SIDE / 2)
    move = centre - turn @ (centre + rng.uniform(-SHIFT, SHIFT, 2))
    image = Image.fromarray(grey).transform(
        (SIDE, SIDE),
        Image.Transform.AFFINE,
        (*turn[0], move[0], *turn[1], move[1]),
        Image.Resampling.BILINEAR,
    )
    return image.resize((SIZE, SIZE), Image.Resampling.NEAREST).convert("RGB")


WORLD = Classes("digits", SIZE, [str(number) for number in range(10)], pictures, num_prompts=50)
