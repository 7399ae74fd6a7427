"""Worlds of a study, one file each: where data come from, what is asked for and what is right in a picture."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from mmtensorar.image_tokenizers import ImageTokenizer


class World(Protocol):
    """A module of this folder is one, or has one called WORLD. folder: where its data are."""

    FEATURES: str  # what `features` are, in words

    def sets(self, folder: Path) -> tuple[Path, Path]:
        """The shard sets of training and validation."""

    def prepare(self, folder: Path) -> None:
        """Make what is missing of them, without codes. Raises ValueError when it fails."""

    def prompts(self) -> list[tuple[str, str]]:
        """(group, prompt) of everything that pictures are asked for; groups are skills, or classes."""

    def correct(self, folder: Path, number: int, images: Sequence[Image.Image]) -> list[bool]:
        """For pictures of that prompt, whether each shows what it asks for."""

    def judge(self, folder: Path, image_tokenizer: ImageTokenizer) -> str:
        """Who says what is correct, and how well, in words."""

    def features(self, folder: Path, image_tokenizer: ImageTokenizer, codes: Tensor) -> np.ndarray:
        """Codes [B, T, 1] -> [B, C] float64, of which the Frechet distance is taken."""


def load(name: str) -> World:
    module = importlib.import_module(f"study.worlds.{name}")
    return getattr(module, "WORLD", module)
