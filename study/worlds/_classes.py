"""A world of classes: a model is asked for a class by its number, and a small classifier, trained on the same pictures, says which it drew."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from mmtensorar.data.shards import MANIFEST
from mmtensorar.files import write_text
from mmtensorar.image_tokenizers import ImageTokenizer, to_images, to_pixels
from study.commands import run
from study.features import (
    WIDTH,
    Classifier,
    load_classifier,
    read_pictures,
    train_classifier,
)

Pictures = Sequence[tuple[int, Image.Image]]


class Classes:
    """See study.worlds.World.

    names: of the classes, in the order of their numbers. pictures: -> (class, picture) of training and of validation.
    num_prompts: how often each class is asked for.
    """

    def __init__(
        self,
        name: str,
        size: int,
        names: Sequence[str],
        pictures: Callable[[], tuple[Pictures, Pictures]],
        *,
        num_prompts: int,
    ):
        self.name, self.size, self.names, self.pictures, self.num_prompts = (
            name,
            size,
            list(names),
            pictures,
            num_prompts,
        )
        self.FEATURES = f"the {WIDTH} features of a small classifier of the same pictures"

    def sets(self, folder: Path) -> tuple[Path, Path]:
        return folder / self.name, folder / f"{self.name}_validation"

    def prepare(self, folder: Path) -> None:
        both = self.sets(folder)
        if not all((path / MANIFEST).is_file() for path in both):
            try:
                drawn = self.pictures()
            except ImportError as error:
                raise ValueError(
                    f"the world {self.name} needs {error.name}: pip install -e '.[study]'"
                ) from None
            for path, part in zip(both, drawn, strict=True):
                if (path / MANIFEST).is_file():
                    continue
                with tempfile.TemporaryDirectory() as temporary:
                    place = Path(temporary) / path.name  # a set is known by its source's name
                    for number in range(len(self.names)):
                        (place / f"{number:03}").mkdir(
                            parents=True
                        )  # all of them, so that numbers are the names' places
                    for index, (number, image) in enumerate(part):
                        image.save(place / f"{number:03}" / f"{index:05}.png")
                    source = ["--class-folder", place, "--image-size", self.size, "--format", "png"]
                    run("data_tools/make_shards.py", *source, "--samples-per-shard", 1000, "--out", path)
        train_classifier(folder / "classifier.safetensors", *both, len(self.names))

    def prompts(self) -> list[tuple[str, str]]:
        return [
            (name, str(number)) for number, name in enumerate(self.names) for _ in range(self.num_prompts)
        ]

    @cached_property
    def _loaded(self) -> dict[Path, tuple[Classifier, float]]:
        return {}

    def classifier(self, folder: Path) -> tuple[Classifier, float]:
        """And the share of validation pictures that it is right about."""
        if folder not in self._loaded:
            self._loaded[folder] = load_classifier(folder / "classifier.safetensors")
        return self._loaded[folder]

    def correct(self, folder: Path, number: int, images: Sequence[Image.Image]) -> list[bool]:
        return [found == number // self.num_prompts for found in self.classifier(folder)[0].classes(images)]

    def judge(self, folder: Path, image_tokenizer: ImageTokenizer) -> str:
        """Measured once, on originals and on what is left of them after the image tokenizer."""
        told = folder / "judge.json"
        if not told.is_file():
            pixels, classes = read_pictures(self.sets(folder)[1])
            device = next(image_tokenizer.parameters()).device
            decoded = [
                image
                for part in pixels.split(32)
                for image in to_images(image_tokenizer.decode(image_tokenizer.encode(part.to(device))))
            ]
            right = np.mean(
                [
                    found == number
                    for found, number in zip(
                        self.classifier(folder)[0].classes(decoded), classes.tolist(), strict=True
                    )
                ]
            )
            write_text(told, json.dumps({"originals": self.classifier(folder)[1], "decoded": float(right)}))
        shares = json.loads(told.read_text(encoding="utf-8"))
        return (
            f"a small classifier of the same pictures, right about {100 * shares['originals']:.1f} % of validation, and about "
            f"{100 * shares['decoded']:.1f} % of it after a round trip through the image tokenizer"
        )

    def features(self, folder: Path, image_tokenizer: ImageTokenizer, codes: Tensor) -> np.ndarray:
        pixels = to_pixels(to_images(image_tokenizer.decode(codes)))
        return self.classifier(folder)[0].features(pixels).double().numpy()
