"""Sets of shards with readable captions, and recipes that read them."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from mmtensorar.data.members import encode_codes
from mmtensorar.data.shards import Codes, Manifest, Sample, write_tar
from mmtensorar.model.conditions import Condition
from mmtensorar.recipe import Data, Run, Train

GRID, NUM_CODES = (1, 2), 1000


def write_set(folder: Path, counts: list[int], crops: int = 1, first: int = 0) -> Path:
    """Write shards in which sample i has the caption "i" and the codes [i, i].

    Numbers start at `first`. With several crops, crop a of sample i has the codes
    [i, a].
    """
    folder.mkdir()
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "JPEG")
    shards, index = [], first
    for number, count in enumerate(counts):
        samples = []
        for _ in range(count):
            members = {"jpg": image.getvalue(), "txt": str(index).encode(), "json": b"{}"}
            codes = [[index, crop if crops > 1 else index] for crop in range(crops)]
            members["codes.npy"] = encode_codes(np.array(codes, np.uint16)[..., None])
            samples.append(Sample(f"{index:09d}", members))
            index += 1
        shards.append(write_tar(folder / f"{number:05d}.tar", samples))
    codes = Codes(
        image_tokenizer="fake", weight_hash="a" * 64, grid=GRID, factor_sizes=(NUM_CODES,), crops=crops
    )
    Manifest(
        shards=tuple(shards), num_samples=index - first, image_size=8, codes=codes, source="test", seed=0
    ).write(folder)
    return folder


def make_recipe(folder: Path, *, batch_size=4, grad_accum=1, seed=3, **settings) -> SimpleNamespace:
    """The sections that the loader and the checks read."""
    settings = {"shuffle": 4, "uncond_rate": 0.5} | settings
    return SimpleNamespace(
        run=Run(name="test", seed=seed),
        data=Data(shards=str(folder), batch_size=batch_size, **settings),
        train=Train(steps=1, grad_accum=grad_accum),
        backbone=SimpleNamespace(name="fake"),
    )


class NumberEncoder:
    """A CaptionEncoder for captions that are numbers, as a text-conditional backbone
    would have one.
    """

    kind, num_classes = "tokens", None

    def __call__(self, captions: list[str]) -> Condition:
        values = torch.tensor([[int(caption)] for caption in captions])
        return Condition(values, torch.ones_like(values, dtype=torch.bool))

    def excess(self, caption: str) -> None:
        """A number is never too long."""

    def to(self, device: torch.device) -> None:
        """Nothing to move."""

    def identity(self) -> None:
        """No text features."""


caption_encoder = NumberEncoder()


def fake_tokenizer(**other) -> SimpleNamespace:
    parts = {
        "name": "fake",
        "weight_hash": "a" * 64,
        "grid": GRID,
        "factor_sizes": (NUM_CODES,),
        "image_size": 8,
    }
    return SimpleNamespace(**parts | other)
