"""Image tokenizers: pixels to discrete codes and back. Frozen, in eval mode, float32, without gradients.

One file each; the recipe's `image_tokenizer: {name: ...}` picks it, and that file's Config
validates the section. Shapes: B batch, H W pixels, T image tokens (raster order), F factors.
"""

from __future__ import annotations

import importlib
from typing import Protocol

from torch import Tensor

from mmtensorar.recipe import RecipeError, Section, named_section


class ImageTokenizer(Protocol):
    """An nn.Module with these parts."""

    name: str
    weight_hash: str  # sha256 over names and float32 values: the same weights in any file layout
    image_size: int  # pixels a side
    grid: tuple[int, int]  # codes down, codes across
    factor_sizes: tuple[int, ...]

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> codes [B, T, F] int64."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, T, F] -> [B, 3, H, W], about -1..1, not clamped."""
        ...

    def save_pretrained(self, folder) -> None:
        """Write config.json and model.safetensors, for `load` to read."""
        ...


def section(settings: dict) -> Section:
    """Validate settings such as {"name": "janus_vq", "path": "FOLDER"}. Raises RecipeError."""
    found, problems = named_section("image_tokenizer", settings)
    if problems:
        raise RecipeError("; ".join(f"{key}: {text}" for key, text in problems))
    return found


def load(section: Section) -> ImageTokenizer:
    """The image tokenizer a section names, on the CPU.

    Raises ValueError or OSError, naming the path, when there is no such model or it does not fit.
    """
    return importlib.import_module(f"mmtensorar.image_tokenizers.{section.name}").load(section)
