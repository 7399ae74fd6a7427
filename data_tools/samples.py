"""From an item of a source to a sample of a shard: what is wanted, how it is cropped and encoded, which are left out."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from data_tools.sources import Item
from data_tools.storage import read_file
from mmtensorar.data.shards import (
    EXTENSIONS,
    Sample,
    decode_image,
    orientation,
    square,
)

Crop = Literal["center", "random", "pad", "stretch"]
Format = Literal["jpg", "png", "webp", "keep"]


@dataclass(frozen=True)
class Wanted:
    """What becomes of pictures and captions, and which of them are taken. Sides in pixels, captions in characters.

    crop: the centre or a random part of the shorter side's square; or the whole picture, on white or stretched. format keep:
    pictures that have the size already stay as they are, others become jpg. max_aspect: longer side over shorter; 0: any.
    """

    image_size: int
    crop: Crop = "center"
    format: Format = "jpg"
    quality: int = 95
    min_side: int = 0
    max_aspect: float = 0.0
    min_caption: int = 0
    max_caption: int = 0
    seed: int = 0


class Unwanted(Exception):
    """Why a filter leaves an item out."""


class Made(NamedTuple):
    """digest: of picture and caption as they came, which tells duplicates. picture: of the picture alone."""

    sample: Sample
    digest: str
    picture: str


def make_sample(key: str, item: Item, wanted: Wanted) -> Made:
    """Raises Unwanted when a filter leaves it out, ValueError naming it when it is damaged."""
    if item.problem:
        raise ValueError(item.problem)
    (caption,) = item.captions
    if len(caption) < wanted.min_caption:
        raise Unwanted(f"caption shorter than {wanted.min_caption} characters")
    if wanted.max_caption and len(caption) > wanted.max_caption:
        raise Unwanted(f"caption longer than {wanted.max_caption} characters")
    found = item.picture()
    if isinstance(found, bytes):
        content, image = found, decode_image(found, _where(item), upright=True)
    else:
        content, image = found.tobytes(), found
    size = original_size(item.meta) or image.size
    if min(size) < wanted.min_side:
        raise Unwanted(f"smaller side below {wanted.min_side} pixels")
    if wanted.max_aspect and max(size) > wanted.max_aspect * min(size):
        raise Unwanted(f"longer side more than {wanted.max_aspect:g} times the smaller")
    # Nested values as text: readers that make a table of the json members need one type per column.
    meta = {
        k: json.dumps(v, sort_keys=True, default=str) if isinstance(v, dict) else v
        for k, v in item.meta.items()
    }
    meta["size"] = list(size)
    extension, picture = _encoded(image, found, item.key, wanted)
    members = {extension: picture, "txt": caption.encode(), "json": json.dumps(meta, sort_keys=True).encode()}
    for name, value in members.items():
        if len(value) > EXTENSIONS[name]:
            raise ValueError(
                f"{_where(item)}: its .{name} would have {len(value)} bytes, more than the {EXTENSIONS[name]} allowed"
            )
    shown = hashlib.sha256(content)
    digest = hashlib.sha256(shown.digest() + caption.encode()).hexdigest()[:32]
    return Made(Sample(key, members), digest, shown.hexdigest()[:32])


def original_size(meta: dict) -> tuple[int, int] | None:
    """Width and height before a picture was cropped for a set of ours, where its json member tells."""
    found = meta.get("size")
    if (
        isinstance(found, list)
        and len(found) == 2
        and all(type(side) is int and 0 < side < 2**31 for side in found)
    ):
        return found[0], found[1]
    return None


def _where(item: Item) -> str:
    # A file's own path is the best name it can have.
    if getattr(item.picture, "func", None) is read_file:
        return str(item.picture.args[0])
    return f"{item.meta.get('source')} {item.key}"


def _encoded(image: Image.Image, found: bytes | Image.Image, key: str, wanted: Wanted) -> tuple[str, bytes]:
    """Extension and content of the picture's member."""
    size = wanted.image_size
    extension = "jpg" if wanted.format == "keep" else wanted.format
    if wanted.format == "keep" and isinstance(found, bytes) and image.size == (size, size):
        with Image.open(io.BytesIO(found)) as original:
            if orientation(original) == 1 and not original.has_transparency_data:
                return {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[original.format], found
    content = io.BytesIO()
    settings = {
        "jpg": {"format": "JPEG", "quality": wanted.quality, "subsampling": 0},
        "png": {"format": "PNG"},
        "webp": {"format": "WEBP", "quality": wanted.quality},
    }
    _cropped(image, key, wanted).save(content, **settings[extension])
    return extension, content.getvalue()


def _cropped(image: Image.Image, key: str, wanted: Wanted) -> Image.Image:
    size = wanted.image_size
    if wanted.crop == "stretch":
        return image.resize((size, size), Image.Resampling.BICUBIC)
    if wanted.crop == "pad":
        return _padded(image, size)
    place = (0.5, 0.5)
    if wanted.crop == "random":
        place = tuple(generator(wanted.seed, key).random(2))
    return square(image, size, place)


def _padded(image: Image.Image, size: int) -> Image.Image:
    """The whole picture in the middle of a white square."""

    def scaled(factor: float) -> tuple[int, int]:
        return max(1, round(image.width * factor)), max(1, round(image.height * factor))

    while max(image.size) >= 2 * size:
        image = image.resize(scaled(0.5), Image.Resampling.BOX)
    image = image.resize(scaled(size / max(image.size)), Image.Resampling.BICUBIC)
    ground = Image.new("RGB", (size, size), "white")
    ground.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return ground


def generator(seed: int, key: str) -> np.random.Generator:
    """Random numbers of one item, wherever it stands."""
    return np.random.default_rng([seed, int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")])
