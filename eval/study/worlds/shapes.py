"""The embedded world of data_tools/shapes.py, scored by its exact detector: the suite `shapes` of eval.geneval."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image

from eval.geneval import suite as suites
from eval.geneval.score import by_class, judge

ROOT = Path(__file__).resolve().parents[3]
# name -> seed and number of pictures; those of training are the demo's.
SETS = {"shapes": (1, 4096), "shapes_validation": (2, 1024)}


@cache
def _suite() -> suites.Suite:
    return suites.load("shapes")


def sets(folder: Path) -> tuple[Path, Path]:
    train, validation = (folder / name for name in SETS)
    return train, validation


def prepare(folder: Path, image_tokenizer: str) -> None:
    for name, (seed, number) in SETS.items():
        make = ["data_tools/make_shards.py", "--synthesize", "shapes", "--seed", str(seed), "--num-samples", str(number)]
        _run([*make, "--samples-per-shard", "512", "--out", str(folder / name)])
        _run(["data_tools/encode_codes.py", str(folder / name), "--image-tokenizer", image_tokenizer])


def _run(command: list[str]) -> None:
    done = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{' '.join(command)}: {done.stderr.strip()[-1000:]}")


def prompts() -> list[tuple[str, str]]:
    return [(prompt["tag"], prompt["prompt"]) for prompt in _suite().prompts]


def correct(number: int, images: Sequence[Image.Image]) -> list[bool]:
    suite = _suite()
    metadata = suite.prompts[number]
    colored = [[clause["class"] for clause in metadata["include"] if "color" in clause]] * len(images)
    found = suite.detector().detect_batch(list(images), colored)
    return [judge(metadata, *by_class(detections), suite.settings).correct for detections in found]
