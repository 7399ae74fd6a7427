"""scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, each turned, moved and scaled a little several times; told apart by a small classifier.

As they are they are so few that a model of half a million parameters has them by heart within minutes. A pixel is drawn two a side.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from study.worlds._classes import Classes

SIDE = 8
SIZE = 2 * SIDE  # pixels a side of a picture
NUM_VALIDATION = 297  # digits
VARIANTS = (8, 4)  # of a digit of training, of validation
DEGREES, SHIFT, SCALE = 12, 0.7, 0.1  # at most: turned, moved in pixels, larger or smaller by this share


def pictures(seed: int = 0) -> tuple[list[tuple[int, Image.Image]], list[tuple[int, Image.Image]]]:
    """(class, picture) of training and of validation, which share no digit."""
    from sklearn.datasets import load_digits

    digits, rng = load_digits(), np.random.default_rng(seed)
    order = rng.permutation(len(digits.images))
    grey = (digits.images * (255 / 16)).round().astype(np.uint8)
    return tuple(
        [(int(digits.target[index]), varied(grey[index], rng)) for index in part for _ in range(variants)]
        for part, variants in zip((order[NUM_VALIDATION:], order[:NUM_VALIDATION]), VARIANTS, strict=True)
    )


def varied(grey: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """[8, 8] uint8 -> RGB of SIZE, turned, moved and scaled by chance."""
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
