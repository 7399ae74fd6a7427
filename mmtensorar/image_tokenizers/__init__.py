"""Image tokenizers: pixels to discrete codes and back. Frozen, in eval mode, float32, without gradients.

One file each; the recipe's `image_tokenizer: {name: ...}` picks it, and that file's Config
validates the section. Shapes: B batch, H W pixels, T image tokens (raster order), F factors.
"""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmtensorar import devices
from mmtensorar.recipe import RecipeError, Section, known_names, named_section


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


class Frozen(nn.Module):
    """What the image tokenizers share: they stay in eval mode, and take pictures of one size."""

    image_size: int

    def train(self, mode: bool = True):
        return super().train(False)  # also inside a model that trains

    def check_size(self, pixels: Tensor) -> None:
        """Raise ValueError unless pixels [B, 3, H, W] are image_size a side."""
        if (found := list(pixels.shape[-2:])) != [self.image_size] * 2:
            raise ValueError(f"pixels are {found}, the image tokenizer expects {self.image_size} a side")


def full_precision(features: Tensor) -> torch.autocast:
    """No autocast while the nearest code is looked up: in bf16 43 % of a small tokenizer's codes became others, so 2 %."""
    return torch.autocast(features.device.type, enabled=False)


def small(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict to write: on the CPU, in float16 where that loses nothing in any tensor."""
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    if all(torch.equal(value.half().float(), value) for value in state.values()):
        return {name: value.half() for name, value in state.items()}
    return state


def check_fit(
    image_tokenizer: ImageTokenizer, backbone: Any, *, image_tokenizer_path: str, backbone_path: str
) -> None:
    """Raise ValueError when an image tokenizer's codes are not those that a backbone predicts."""
    expected = (backbone.num_tokens, tuple(backbone.factor_sizes))
    found = (math.prod(image_tokenizer.grid), tuple(image_tokenizer.factor_sizes))
    problem = None
    if expected != found:
        makes, predicts = (
            f"{num} codes an image out of {' x '.join(map(str, sizes))}" for num, sizes in (found, expected)
        )
        problem = f"it makes {makes}, the backbone predicts {predicts}"
    # LlamaGen's codebooks of both conditions have one shape.
    made_for = getattr(image_tokenizer, "condition", None)
    condition = getattr(getattr(backbone, "config", None), "condition", None)
    if None not in (made_for, condition) and made_for != condition:
        problem = f"it is that of the {made_for}-conditional models, the backbone is {condition}-conditional"
    if problem:
        raise ValueError(f"{image_tokenizer_path} is not the image tokenizer of {backbone_path}: {problem}")


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


# ---- pictures ------------------------------------------------------------------------------------


def to_pixels(images: Sequence[Image.Image | np.ndarray]) -> Tensor:
    """B RGB images of one size, or [H, W, 3] uint8 -> [B, 3, H, W] in [-1, 1]."""
    return (
        torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float()
        / 127.5
        - 1
    )


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels [B, 3, H, W] in [-1, 1], clamped -> RGB images."""
    arrays = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def round_trip(
    image_tokenizer: Any, images: Sequence[Image.Image], *, batch_size: int = 32
) -> Iterator[Image.Image]:
    """RGB images of the image tokenizer's size, encoded and decoded again, batch_size at a time."""
    device = next(image_tokenizer.parameters()).device
    for start in range(0, len(images), batch_size):
        pixels = to_pixels(images[start : start + batch_size]).to(device)
        with torch.no_grad():
            decoded = image_tokenizer.decode(image_tokenizer.encode(pixels))
        yield from to_images(decoded)


# ---- command lines -------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """The options from which `from_arguments` loads an image tokenizer."""
    parser.add_argument(
        "--image-tokenizer",
        "--tokenizer",
        required=required,
        metavar="PATH",
        help="its weights: folder, file or hub id",
    )
    known = ", ".join(known_names("image_tokenizer"))
    parser.add_argument("--name", help=f"kind of image tokenizer, where its tensors do not tell: {known}")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="pixels a side it works at, where its files do not tell (llamagen_vq)",
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")


def from_arguments(options: argparse.Namespace) -> tuple[ImageTokenizer, torch.device]:
    """The image tokenizer that the options name, and the device it is on. Raises ValueError or OSError."""
    device = devices.pick(options.device)
    name = options.name
    if name is None:
        from mmtensorar import convert  # which knows all kinds by their tensors

        name = convert.image_tokenizer_at(options.image_tokenizer, option="--name").kind
    settings = {"name": name, "path": options.image_tokenizer}
    loaded = None
    if options.image_size is not None:
        if "image_size" in importlib.import_module(f"mmtensorar.image_tokenizers.{name}").Config.model_fields:
            settings["image_size"] = options.image_size
        elif (loaded := load(section(settings))).image_size != options.image_size:
            raise ValueError(
                f"{options.image_tokenizer} works at {loaded.image_size} pixels, --image-size is {options.image_size}"
            )
    # In this memory layout 1.6 times as fast on CPU.
    loaded = loaded or load(section(settings))
    return loaded.to(device, memory_format=torch.channels_last), device
