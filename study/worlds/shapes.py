"""The embedded world of worlds/shapes, scored by its exact detector (suite `shapes` of
eval.geneval).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from eval.geneval import score, suites
from mmtensorar.image_tokenizers import ImageTokenizer
from study.commands import run
from study.features import quarters

# name -> seed and number of pictures; the training pictures are the demo's
SETS = {"shapes": (1, 4096), "shapes_validation": (2, 1024)}
FEATURES = "the image tokenizer's code vectors, averaged over quarters"


@cache
def _suite() -> suites.Suite:
    return suites.load("shapes")


def sets(folder: Path) -> tuple[Path, Path]:
    train, validation = (folder / name for name in SETS)
    return train, validation


def prepare(folder: Path) -> None:
    for name, (seed, num_samples) in SETS.items():
        options = ["--synthesize", "shapes", "--seed", seed, "--num-samples", num_samples]
        options += ["--samples-per-shard", 512, "--out", folder / name]
        run("data_tools/make_shards.py", *options)


def prompts() -> list[tuple[str, str]]:
    return [(prompt["tag"], prompt["prompt"]) for prompt in _suite().prompts]


def correct(folder: Path, number: int, images: Sequence[Image.Image]) -> list[bool]:
    suite = _suite()
    metadata = suite.prompts[number]
    colored = [[clause["class"] for clause in metadata["include"] if "color" in clause]] * len(images)
    detected = suite.detector().detect_batch(list(images), colored)
    return [
        score.judge(metadata, *score.by_class(detections), suite.settings).correct for detections in detected
    ]


def judge(folder: Path, image_tokenizer: ImageTokenizer) -> str:
    return "the exact detector of the suite `shapes`"


def features(folder: Path, image_tokenizer: ImageTokenizer, codes: Tensor) -> np.ndarray:
    return quarters(image_tokenizer, codes)
