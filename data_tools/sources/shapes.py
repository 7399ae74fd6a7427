"""The embedded world `shapes`: scenes drawn from a caption grammar (see
worlds/shapes/draw.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from PIL import Image

from data_tools.argument_types import positive
from data_tools.sources import Item, Layout, Listing, Source
from worlds.shapes import draw


def read(location: str, layout: Layout) -> Listing:
    """--num-samples scenes. location: the world's name."""
    return Listing(items(layout.arguments["num_samples"], seed=layout.seed, size=layout.image_size))


def items(num_samples: int, *, seed: int, size: int) -> Iterator[Item]:
    """Items of drawn scenes.

    Item `index` depends on seed and index alone. size: pixels a side.
    """
    for index in range(num_samples):
        scene = draw.sample_scene(np.random.default_rng([seed, index]))
        meta = {"source": "shapes", "scene": scene.metadata}
        yield Item(str(index), partial(_draw, seed, index, size), (scene.caption,), meta)


def _draw(seed: int, index: int, size: int) -> Image.Image:
    rng = np.random.default_rng([seed, index])
    return draw.draw(draw.sample_scene(rng), rng, size)


SOURCE = Source(
    "--synthesize",
    "draw an embedded world",
    read,
    uses=(),
    choices=("shapes",),
    is_drawn=True,
    image_size=64,
    arguments={
        "--num-samples": {"type": positive, "default": 4096, "help": "pictures to draw (default: 4096)"}
    },
)
