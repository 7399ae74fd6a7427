"""Worlds of a study, one file each: where data come from, what is asked for and what is right in a picture."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image


class World(Protocol):
    """A module of this folder is one."""

    def sets(self, folder: Path) -> tuple[Path, Path]:
        """The shard sets of training and validation inside folder."""

    def prepare(self, folder: Path, image_tokenizer: str) -> None:
        """Make what is missing of them, with codes of the image tokenizer. Raises ValueError when it fails."""

    def prompts(self) -> list[tuple[str, str]]:
        """(group, prompt) of everything that pictures are asked for; groups are skills, or classes."""

    def correct(self, number: int, images: Sequence[Image.Image]) -> list[bool]:
        """For pictures of that prompt, whether each shows what it asks for."""


def load(name: str) -> World:
    return importlib.import_module(f"eval.study.worlds.{name}")
