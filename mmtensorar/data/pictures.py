"""Pictures: decode, turn upright, and cut to a square."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mmtensorar.data.shards import IMAGE_EXTENSIONS, Sample

MAX_PIXELS = 89_000_000  # just under the number at which Pillow starts to warn
FORMATS = ("JPEG", "PNG", "WEBP")

# Pillow warns about damaged metadata, one line a picture; pixels and errors are not affected.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode_picture(content: bytes, where: str, *, upright: bool = False) -> Image.Image:
    """An encoded picture as RGB. Transparent parts become white.

    Args:
        where: Start of error messages.
        upright: Turn the picture as its EXIF orientation says.

    Raises ValueError for anything but a complete JPEG, PNG or WEBP of at most MAX_PIXELS.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:  # from the header: nothing is decoded yet
                raise ValueError(f"{width}x{height} pixels, more than the {MAX_PIXELS} allowed")
            image.load()
            if upright:
                turn_upright(image)
            return _as_rgb(image)
    except MemoryError:
        raise ValueError(f"{where}: unreadable image (more than fits into memory)") from None
    # Pillow raises many kinds of errors for damage, depending on the format.
    except Exception as error:
        reason = "not a JPEG, PNG or WEBP" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{where}: unreadable image ({reason})") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow's own conversion cuts everything brighter than 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"grey levels of 32 bits (mode {image.mode}); expected 8 or 16")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy


def turn_upright(image: Image.Image) -> None:
    """Turn a picture, in place, as its EXIF orientation says."""
    try:
        # In place: an error in the other EXIF tags comes after the turn and must not undo it.
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # damaged EXIF; the picture itself may be good
        pass


def is_upright(image: Image.Image) -> bool:
    """Whether the EXIF orientation leaves the picture as it is, or is absent or unreadable."""
    try:
        return image.getexif().get(0x0112, 1) == 1
    except Exception:  # damaged EXIF; the picture itself may be good
        return True


# ---- pictures of samples ---------------------------------------------------------------------


def encoded_picture(sample: Sample, where: str) -> bytes:
    """A sample's picture, still encoded. Raises ValueError unless there is exactly one."""
    names = [name for name in IMAGE_EXTENSIONS if name in sample.members]
    if len(names) != 1:
        raise ValueError(
            f"{where}: expected one of {', '.join(IMAGE_EXTENSIONS)}, found {', '.join(names) or 'none'}"
        )
    return sample.members[names[0]]


def sample_picture(sample: Sample, where: str, image_size: int) -> Image.Image:
    """A sample's picture as RGB.

    Raises ValueError when it is damaged or does not have the size that the manifest says.
    """
    image = decode_picture(encoded_picture(sample, where), where)
    if image.size != (image_size, image_size):
        raise ValueError(
            f"{where}: the image is {image.width}x{image.height}; the manifest says {image_size}x{image_size}"
        )
    return image


# ---- cutting ---------------------------------------------------------------------------------


def center_square(
    image: Image.Image, image_size: int, shares: tuple[float, float] = (0.5, 0.5)
) -> Image.Image:
    """The centre square of a picture, scaled to image_size pixels a side.

    The picture is halved while its shorter side is at least twice image_size, then resized
    with bicubic weights, enlarged if necessary. The pictures that ADM and LlamaGen were trained on
    were made like this (center_crop_arr).

    Args:
        shares: Parts of the surplus that are cut at the left and at the top; the default is
            the centre.
    """
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if max(image.size) > 8 * min(image.size):
        # Scaling a line of 1 x 60,000 pixels as a whole would take gigabytes, so the surplus
        # is cut first.
        short = min(image.size)
        left, top = (
            int((side - min(side, 4 * short)) * share) for side, share in zip(image.size, shares, strict=True)
        )
        image = image.crop(
            (left, top, left + min(image.width, 4 * short), top + min(image.height, 4 * short))
        )
    scale = image_size / min(image.size)
    width, height = (max(image_size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = int((width - image_size) * shares[0]), int((height - image_size) * shares[1])
    return image.crop((left, top, left + image_size, top + image_size))
