"""Worlds of a study, one file each: where data come from, the prompts, and which
pictures are right.
"""

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
    """A module of this folder is a world, or has one called WORLD.

    folder: where its data are.
    """

    FEATURES: str  # describes `features`

    def sets(self, folder: Path) -> tuple[Path, Path]:
        """The shard sets of training and validation."""

    def prepare(self, folder: Path) -> None:
        """Make the missing shard sets, without codes.

        Raises ValueError when it fails.
        """

    def prompts(self) -> list[tuple[str, str]]:
        """(group, prompt) of each prompt; groups are skills, or classes."""

    def correct(self, folder: Path, number: int, images: Sequence[Image.Image]) -> list[bool]:
        """Whether each picture shows what prompt number `number` asks for."""

    def judge(self, folder: Path, image_tokenizer: ImageTokenizer) -> str:
        """What decides which pictures are right, and how reliably, as a phrase for the
        page.
        """

    def features(self, folder: Path, image_tokenizer: ImageTokenizer, codes: Tensor) -> np.ndarray:
        """Codes [B, T, 1] -> features [B, C] float64 for the Frechet distance."""


def load(name: str) -> World:
    module = importlib.import_module(f"study.worlds.{name}")
    return getattr(module, "WORLD", module)
