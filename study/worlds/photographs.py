"""Crops of the photographs inside scikit-learn and scikit-image; a class is a
photograph.

A small classifier judges which photograph a picture shows. Validation crops come from
the same photographs and overlap with training crops. Their position and scale differ,
and so do their tokens, but nothing here measures how a model does on a photograph that
it has not seen.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from mmtensorar.data.pictures import open_picture
from study.worlds._classes import Classes

SIZE = 64  # pixels a side of a crop
SIDES = (96, 192)  # pixels a side of a crop before it is reduced, smallest and largest
NUM_TRAIN, NUM_VALIDATION = 12_000, 1_000
SCIKIT_LEARN = ("china.jpg", "flower.jpg")
SCIKIT_IMAGE = (
    "astronaut.png brick.png camera.png chelsea.png coffee.png coins.png grass.png gravel.png "
    "hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png retina.jpg rocket.jpg"
).split()


def photographs() -> dict[str, Image.Image]:
    """Name -> RGB photograph of the packages."""
    import skimage
    import sklearn

    folders = [
        (Path(sklearn.__file__).parent / "datasets/images", SCIKIT_LEARN),
        (Path(skimage.__file__).parent / "data", SCIKIT_IMAGE),
    ]
    return {Path(name).stem: open_picture(folder / name) for folder, names in folders for name in names}


def pictures(seed: int = 0) -> tuple[list[tuple[int, Image.Image]], list[tuple[int, Image.Image]]]:
    """(class, crop) of training and of validation: random class, scale and position,
    half are mirrored.
    """
    rng, sources = np.random.default_rng(seed), list(photographs().values())
    drawn = []
    for _ in range(NUM_TRAIN + NUM_VALIDATION):
        number, side = int(rng.integers(len(sources))), int(rng.integers(SIDES[0], SIDES[1] + 1))
        width, height = sources[number].size
        left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        crop = sources[number].resize(
            (SIZE, SIZE), Image.Resampling.LANCZOS, (left, top, left + side, top + side)
        )
        drawn.append(
            (number, crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop)
        )
    return drawn[:NUM_TRAIN], drawn[NUM_TRAIN:]


WORLD = Classes(
    "photographs",
    SIZE,
    [Path(name).stem for name in (*SCIKIT_LEARN, *SCIKIT_IMAGE)],
    pictures,
    num_prompts=30,
)
