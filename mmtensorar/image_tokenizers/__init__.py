"""Image tokenizers: pixels to discrete codes and back.

Frozen, in eval mode, float32, without gradients.

There is one file per image tokenizer. The recipe's `image_tokenizer: {name: ...}`
selects it, and the file's Config validates the section. mmtensorar/model/protocols.py
lists what a file defines.
Shapes: B batch, H W pixels, T image tokens (raster order), F factors.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from mmtensorar.checkpoints.released import WEIGHTS, write_config
from mmtensorar.model.protocols import Backbone, ImageTokenizer, ImageTokenizerFile
from mmtensorar.recipe import NamedSection, RecipeError, named_section


def file(name: str) -> ImageTokenizerFile:
    """The file that defines an image tokenizer, imported."""
    return cast(ImageTokenizerFile, importlib.import_module(f"{__name__}.{name}"))


def section(settings: dict) -> NamedSection:
    """Validate settings such as {"name": "janus_vq", "path": "FOLDER"}.

    Raises RecipeError.
    """
    validated, problems = named_section("image_tokenizer", settings)
    if validated is None or problems:
        raise RecipeError("; ".join(f"{key}: {text}" for key, text in problems))
    return validated


def load(section: NamedSection) -> ImageTokenizer:
    """The image tokenizer a section names, on the CPU.

    Raises ValueError or OSError, naming the path, when there is no such model or it
    does not fit.
    """
    return file(section.name).load(section)


def check_fit(
    image_tokenizer: ImageTokenizer, backbone: Backbone, *, image_tokenizer_path: str, backbone_path: str
) -> None:
    """Raise ValueError when an image tokenizer's codes are not those that a backbone
    predicts.
    """
    makes = (math.prod(image_tokenizer.grid), tuple(image_tokenizer.factor_sizes))
    predicts = (backbone.num_tokens, tuple(backbone.factor_sizes))
    problem = image_tokenizer.misfit(backbone)
    if makes != predicts:
        problem = f"it makes {_describe(*makes)}, the backbone predicts {_describe(*predicts)}"
    if problem:
        raise ValueError(f"{image_tokenizer_path} is not the image tokenizer of {backbone_path}: {problem}")


def _describe(num_codes: int, factor_sizes: tuple[int, ...]) -> str:
    return f"{num_codes} codes an image out of {' x '.join(map(str, factor_sizes))}"


# ---- for the files -------------------------------------------------------------------------------


class Frozen(nn.Module, ABC):
    """Base of the image tokenizers: always in eval mode, for images of one size.

    A subclass sets the attributes of ImageTokenizer, and defines encode, decode,
    official_tensors and save_pretrained (or derives from FrozenWithConfig, which has
    the latter).
    """

    name: str
    image_size: int

    def freeze(self) -> None:
        """Float32, eval mode, no gradients: to call at the end of the constructor."""
        self.float().eval().requires_grad_(False)

    def train(self, mode: bool = True):
        """Stay in eval mode, also inside a model that trains."""
        return super().train(False)

    def check_size(self, pixels: Tensor) -> None:
        """Raise ValueError unless pixels [B, 3, H, W] are image_size a side."""
        if (size := list(pixels.shape[-2:])) != [self.image_size] * 2:
            raise ValueError(f"pixels are {size}, the image tokenizer expects {self.image_size} a side")

    def misfit(self, backbone: Backbone) -> str | None:
        """See ImageTokenizer: equal codes are enough, unless a subclass knows
        better.
        """
        return None

    @abstractmethod
    def official_tensors(self) -> dict[str, Tensor]:
        """See ImageTokenizer."""


class FrozenWithConfig(Frozen):
    """Base of the image tokenizers that are our own code: they are saved with a
    config.json of ours.
    """

    @abstractmethod
    def config_settings(self) -> dict[str, Any]:
        """The settings in config.json, without model_type."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, in float16 where that loses
        nothing.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(shrink(self.official_tensors()), folder / WEIGHTS, metadata={"format": "pt"})
        write_config(folder, self.name, self.config_settings())


def full_precision(features: Tensor) -> torch.autocast:
    """No autocast while the nearest code is looked up.

    In bf16, 43 % of a small tokenizer's codes changed; with this context, 2 %.
    """
    return torch.autocast(features.device.type, enabled=False)


def shrink(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict to write: on the CPU, in float16 where that loses nothing in any
    tensor.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    if all(torch.equal(value.half().float(), value) for value in state.values()):
        return {name: value.half() for name, value in state.items()}
    return dict(state)


# ---- images --------------------------------------------------------------------------------------


def to_pixels(images: Sequence[Image.Image | np.ndarray]) -> Tensor:
    """B RGB images of one size, or [H, W, 3] uint8 -> [B, 3, H, W] in [-1, 1]."""
    arrays = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels [B, 3, H, W] in [-1, 1], clamped -> RGB images."""
    arrays = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def round_trip(
    image_tokenizer: ImageTokenizer, images: Sequence[Image.Image], *, batch_size: int = 32
) -> Iterator[Image.Image]:
    """RGB images of the image tokenizer's size, encoded and decoded again, batch_size
    at a time.
    """
    device = next(image_tokenizer.parameters()).device
    for start in range(0, len(images), batch_size):
        pixels = to_pixels(images[start : start + batch_size]).to(device)
        with torch.no_grad():
            decoded = image_tokenizer.decode(image_tokenizer.encode(pixels))
        yield from to_images(decoded)


def takes_image_size(name: str) -> bool:
    """Whether this image tokenizer's section has a setting image_size."""
    return "image_size" in file(name).Config.model_fields
