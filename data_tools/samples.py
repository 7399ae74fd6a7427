"""From an item of a source to a sample of a shard: filters, crop, and encoding of the
picture.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from PIL import Image

from data_tools.sources import Item
from data_tools.storage import read_file
from mmtensorar.data.pictures import center_square, decode_picture, kept_extension
from mmtensorar.data.shards import EXTENSIONS, Sample
from mmtensorar.seeds import generator_for

Crop = Literal["center", "random", "pad", "stretch"]
Format = Literal["jpg", "png", "webp", "keep"]


@dataclass(frozen=True)
class SampleSettings:
    """Which pictures and captions are taken, and how pictures are stored.

    Sides are in pixels, captions in characters. A bound of 0 means no bound.

    Args:
        crop: center and random cut a square of the shorter side; pad puts the whole
            picture on white; stretch changes its aspect.
        format: keep leaves a picture unchanged if it already has the size, and makes
            others jpg.
        quality: for jpg and webp.
        max_aspect: the longer side divided by the shorter.
        seed: for random crops.
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


class FilteredOut(Exception):
    """Why a filter leaves an item out."""


class MadeSample(NamedTuple):
    """A sample, and two digests by which duplicates are recognised.

    digest: of picture and caption as the source has them. picture: of the picture
    alone.
    """

    sample: Sample
    digest: str
    picture: str


def make_sample(key: str, item: Item, settings: SampleSettings) -> MadeSample:
    """The sample of an item, with its one caption.

    Raises FilteredOut when a filter leaves it out, and ValueError, naming the item,
    when it is damaged.
    """
    if item.problem:
        raise ValueError(item.problem)
    (caption,) = item.captions
    _filter_caption(caption, settings)
    source = item.picture()
    if isinstance(source, bytes):
        content, image = source, decode_picture(source, _where(item), upright=True)
    else:
        content, image = source.tobytes(), source
    size = original_size(item.meta) or image.size
    _filter_size(size, settings)
    # Nested values become text: readers that make a table of the json members need one
    # type per column.
    meta = {
        name: json.dumps(value, sort_keys=True, default=str) if isinstance(value, dict) else value
        for name, value in item.meta.items()
    }
    meta["size"] = list(size)
    extension, picture = _encode_picture(image, source, item.key, settings)
    members = {extension: picture, "txt": caption.encode(), "json": json.dumps(meta, sort_keys=True).encode()}
    for name, value in members.items():
        if len(value) > EXTENSIONS[name]:
            raise ValueError(
                f"{_where(item)}: its .{name} would have {len(value)} bytes, "
                f"more than the {EXTENSIONS[name]} allowed"
            )
    picture_hash = hashlib.sha256(content)
    digest = hashlib.sha256(picture_hash.digest() + caption.encode()).hexdigest()[:32]
    return MadeSample(Sample(key, members), digest, picture_hash.hexdigest()[:32])


def _filter_caption(caption: str, settings: SampleSettings) -> None:
    if len(caption) < settings.min_caption:
        raise FilteredOut(f"caption shorter than {settings.min_caption} characters")
    if settings.max_caption and len(caption) > settings.max_caption:
        raise FilteredOut(f"caption longer than {settings.max_caption} characters")


def _filter_size(size: tuple[int, int], settings: SampleSettings) -> None:
    if min(size) < settings.min_side:
        raise FilteredOut(f"smaller side below {settings.min_side} pixels")
    if settings.max_aspect and max(size) > settings.max_aspect * min(size):
        raise FilteredOut(f"longer side more than {settings.max_aspect:g} times the smaller")


def original_size(meta: dict) -> tuple[int, int] | None:
    """Width and height before the picture was cropped for one of our sets, if its json
    says so.
    """
    size = meta.get("size")
    if (
        isinstance(size, list)
        and len(size) == 2
        and all(type(side) is int and 0 < side < 2**31 for side in size)
    ):
        return size[0], size[1]
    return None


def _where(item: Item) -> str:
    # A picture in a file is named by its path.
    picture: Any = item.picture
    if getattr(picture, "func", None) is read_file:
        return str(picture.args[0])
    return f"{item.meta.get('source')} {item.key}"


def _encode_picture(
    image: Image.Image, source: bytes | Image.Image, key: str, settings: SampleSettings
) -> tuple[str, bytes]:
    """Extension and content of the picture's member.

    image: decoded from source, upright.
    """
    size = settings.image_size
    extension = "jpg" if settings.format == "keep" else settings.format
    if settings.format == "keep" and isinstance(source, bytes) and image.size == (size, size):
        if kept := kept_extension(source):
            return kept, source
    content = io.BytesIO()
    encoding = {
        "jpg": {"format": "JPEG", "quality": settings.quality, "subsampling": 0},
        "png": {"format": "PNG"},
        "webp": {"format": "WEBP", "quality": settings.quality},
    }
    _crop(image, key, settings).save(content, **encoding[extension])
    return extension, content.getvalue()


def _crop(image: Image.Image, key: str, settings: SampleSettings) -> Image.Image:
    size = settings.image_size
    if settings.crop == "stretch":
        return image.resize((size, size), Image.Resampling.BICUBIC)
    if settings.crop == "pad":
        return _pad(image, size)
    shares = (0.5, 0.5)
    if settings.crop == "random":
        shares = tuple(generator_for(settings.seed, key).random(2))
    return center_square(image, size, shares)


def _pad(image: Image.Image, size: int) -> Image.Image:
    """The whole picture in the middle of a white square."""

    def scaled(factor: float) -> tuple[int, int]:
        return max(1, round(image.width * factor)), max(1, round(image.height * factor))

    while max(image.size) >= 2 * size:
        image = image.resize(scaled(0.5), Image.Resampling.BOX)
    image = image.resize(scaled(size / max(image.size)), Image.Resampling.BICUBIC)
    ground = Image.new("RGB", (size, size), "white")
    ground.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return ground
