"""Which backbone or image tokenizer a released file or folder holds, from its
config.json or its tensors.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import NamedTuple

import torch

from mmtensorar import backbones, devices, image_tokenizers
from mmtensorar.checkpoints import model_folder
from mmtensorar.checkpoints.released import ReleasedWeights, locate, read_config
from mmtensorar.model.protocols import BackboneFile, ImageTokenizer, ImageTokenizerFile
from mmtensorar.recipe import known_names

WRAPPERS = ("ema", "model", "module", "state_dict")  # those of all kinds; only tensor names are read here


class Source(NamedTuple):
    """A released model on this machine."""

    kind: str  # name of the file in mmtensorar/backbones or mmtensorar/image_tokenizers
    path: Path
    tensors: ReleasedWeights

    @property
    def files(self) -> list[Path]:
        """Its weights files and its config.json."""
        config = self.path / "config.json"
        return [*self.tensors.files, *([config] if config.is_file() else [])]

    @property
    def is_image_tokenizer(self) -> bool:
        return self.kind in known_names("image_tokenizer")


def kinds() -> list[str]:
    """The names of all backbones, then of all image tokenizers."""
    return [*known_names("backbone"), *known_names("image_tokenizer")]


def find(path: str, kind: str | None = None, *, key: str = "SRC", option: str = "--kind") -> Source:
    """The released model at a path or Hugging Face id.

    Args:
        path: see `released.locate`.
        kind: its kind, if the caller knows it.
        key: what the path is called in error messages.
        option: the option that names the kind, for error messages.

    Raises ValueError when nothing is there, or its kind cannot be recognised.
    """
    if (Path(path) / model_folder.INDEX).is_file():
        raise ValueError(
            f"{key}: {path} is a model folder of this project already; --original writes it back"
        )
    located = Path(os.path.abspath(locate(path, key=key)))
    tensors = ReleasedWeights(located, WRAPPERS)
    kind = kind or _kind_by_config(located, key) or _kind_by_tensors(tensors)
    if kind is None:
        some = ", ".join(sorted(tensors.shapes)[:10]) or "none"
        raise ValueError(
            f"{located}: its tensors belong to no known model ({some}); "
            f"if it is one, name it with {option} ({', '.join(kinds())})"
        )
    return Source(kind, located, tensors)


def _definitions() -> dict[str, BackboneFile | ImageTokenizerFile]:
    """Kind -> the module that defines it; backbones first, since they may contain an
    image tokenizer.
    """
    definitions: dict[str, BackboneFile | ImageTokenizerFile] = {}
    definitions |= {name: backbones.file(name) for name in known_names("backbone")}
    return definitions | {name: image_tokenizers.file(name) for name in known_names("image_tokenizer")}


def _kind_by_config(path: Path, key: str) -> str | None:
    """By model_type; None for a file, or where config.json is missing or has another
    meaning.
    """
    if not path.is_dir():
        return None
    kind_of = {model_type: name for name, file in _definitions().items() for model_type in file.MODEL_TYPES}
    try:
        return kind_of[read_config(path, *kind_of, key=key)["model_type"]]
    except ValueError:
        return None


def _kind_by_tensors(tensors: ReleasedWeights) -> str | None:
    for name, file in _definitions().items():
        if any(signature in tensors.shapes for signature in file.SIGNATURES):
            return name
    return None


def image_tokenizer_at(path: str, *, option: str = "--kind") -> Source:
    """The image tokenizer at a path or Hugging Face id, in a separate file or inside a
    backbone's.

    Raises ValueError like `find`.
    """
    source = find(path, key="--image-tokenizer", option=option)
    if source.is_image_tokenizer:
        return source
    if (inside := image_tokenizer_inside(source)) is None:
        raise ValueError(f"--image-tokenizer: {source.path} is a {source.kind} backbone")
    return inside


def image_tokenizer_inside(source: Source) -> Source | None:
    """The image tokenizer in a backbone's files, or None."""
    file = backbones.file(source.kind)
    if not any(name.startswith(file.IMAGE_TOKENIZER_PREFIXES) for name in source.tensors.shapes):
        return None
    return source._replace(kind=file.IMAGE_TOKENIZER)


def image_tokenizer_from_arguments(options: argparse.Namespace) -> tuple[ImageTokenizer, torch.device]:
    """The image tokenizer that the options of `checkpoints.options` name, and its
    device.

    Raises ValueError or OSError when there is no such model or device, or its image
    size differs.
    """
    device = devices.pick(options.device)
    path, image_size = options.image_tokenizer, options.image_size
    name = options.name or image_tokenizer_at(path, option="--name").kind
    settings = {"name": name, "path": path}
    # An unknown name is reported by `section` below, which lists the known ones.
    if image_size is not None and name in known_names("image_tokenizer"):
        if image_tokenizers.takes_image_size(name):
            settings["image_size"] = image_size
    loaded = image_tokenizers.load(image_tokenizers.section(settings))
    if image_size not in (None, loaded.image_size):
        raise ValueError(f"{path} works at {loaded.image_size} pixels, --image-size is {image_size}")
    # In this memory layout it is 1.6 times as fast on a CPU.
    return loaded.to(device, memory_format=torch.channels_last), device
