"""A world of classes: prompts are class numbers, and a small classifier judges which
class was drawn.

The classifier is trained on the same pictures.
"""

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
from mmtensorar.files import read_text, write_text
from mmtensorar.image_tokenizers import ImageTokenizer, round_trip, to_images, to_pixels
from study.commands import run
from study.features import WIDTH, Classifier, load_classifier, read_pictures, train_classifier

Pictures = Sequence[tuple[int, Image.Image]]


class Classes:
    """See study.worlds.World.

    Args:
        name: of the world.
        size: pixels a side.
        names: of the classes, in the order of their numbers.
        pictures: returns (class, picture) pairs of training and of validation.
        num_prompts: of each class.
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
        self.name, self.size, self.names = name, size, list(names)
        self.pictures, self.num_prompts = pictures, num_prompts
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
            for path, pictures in zip(both, drawn, strict=True):
                if not (path / MANIFEST).is_file():
                    self._write_shards(path, pictures)
        train_classifier(folder / "classifier.safetensors", *both, len(self.names))

    def _write_shards(self, path: Path, pictures: Pictures) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / path.name  # the manifest records its name
            # A folder for every class, also an empty one, so that folder numbers are
            # class numbers.
            for number in range(len(self.names)):
                (folder / f"{number:03}").mkdir(parents=True)
            for index, (number, image) in enumerate(pictures):
                image.save(folder / f"{number:03}" / f"{index:05}.png")
            source = ["--class-folder", folder, "--image-size", self.size, "--format", "png"]
            run("data_tools/make_shards.py", *source, "--samples-per-shard", 1000, "--out", path)

    def prompts(self) -> list[tuple[str, str]]:
        return [
            (name, str(number)) for number, name in enumerate(self.names) for _ in range(self.num_prompts)
        ]

    @cached_property
    def _loaded(self) -> dict[Path, tuple[Classifier, float]]:
        return {}

    def classifier(self, folder: Path) -> tuple[Classifier, float]:
        """The classifier, and the share of validation pictures that it classifies
        correctly.
        """
        if folder not in self._loaded:
            self._loaded[folder] = load_classifier(folder / "classifier.safetensors")
        return self._loaded[folder]

    def correct(self, folder: Path, number: int, images: Sequence[Image.Image]) -> list[bool]:
        wanted = number // self.num_prompts
        return [drawn == wanted for drawn in self.classifier(folder)[0].classes(images)]

    def judge(self, folder: Path, image_tokenizer: ImageTokenizer) -> str:
        """Measured once, on originals and on their round trip through the image
        tokenizer.
        """
        stored = folder / "judge.json"
        if not stored.is_file():
            classifier, originals = self.classifier(folder)
            pixels, classes = read_pictures(self.sets(folder)[1])
            decoded = list(round_trip(image_tokenizer, to_images(pixels)))
            right = np.mean(np.array(classifier.classes(decoded)) == classes.numpy())
            write_text(stored, json.dumps({"originals": originals, "decoded": float(right)}))
        shares = json.loads(read_text(stored))
        return (
            f"a small classifier of the same pictures, right about {100 * shares['originals']:.1f} % of "
            f"validation, and about {100 * shares['decoded']:.1f} % of it after a round trip through the "
            "image tokenizer"
        )

    def features(self, folder: Path, image_tokenizer: ImageTokenizer, codes: Tensor) -> np.ndarray:
        pixels = to_pixels(to_images(image_tokenizer.decode(codes)))
        return self.classifier(folder)[0].features(pixels).double().numpy()
