"""Pictures: open, turn upright, and cut to a square.

All commands open pictures here, so that a picture is the same wherever it is read.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from mmtensorar.data import damage, jpegs
from mmtensorar.data.shards import IMAGE_EXTENSIONS, Sample

MAX_PIXELS = 89_000_000  # just under the number at which Pillow starts to warn
MAX_BYTES = 2**30  # of a file that is not in a shard
# What the members of shards may be; their extensions are in MEMBERS.
SHARD_FORMATS = ("JPEG", "PNG", "WEBP")
MEMBERS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
FORMATS = (*SHARD_FORMATS, "BMP", "GIF", "TIFF")
# Files whose names end so are taken for pictures, where no row names them.
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".mpo"),
    *(".jpe", ".jfif", ".apng"),
)

# Pillow warns about damaged metadata, one line a picture; pixels and errors are not
# affected.
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_picture(path: Path) -> Image.Image:
    """The picture in a file as RGB, turned as its EXIF orientation says.

    Raises ValueError naming the file when it is missing or not a complete picture.
    """
    try:
        num_bytes = path.stat().st_size
        content = path.read_bytes() if num_bytes <= MAX_BYTES else b""
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if num_bytes > MAX_BYTES:
        raise ValueError(f"{path}: {num_bytes} bytes, more than the {MAX_BYTES} allowed")
    return decode_picture(content, str(path), upright=True)


def decode_picture(
    content: bytes, where: str, *, upright: bool = False, formats: tuple[str, ...] = FORMATS
) -> Image.Image:
    """An encoded picture as RGB; of an animation, the first frame.

    Transparent parts become white.

    Args:
        where: Start of error messages.
        upright: Turn the picture as its EXIF orientation says.
        formats: Those that are allowed.

    Raises ValueError for anything but a complete picture of at most MAX_PIXELS, and for
    one whose data are damaged, as far as that shows (docs/data.md).
    """
    try:
        with _opened(content, formats) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:  # from the header: nothing is decoded yet
                raise ValueError(f"{width}x{height} pixels, more than the {MAX_PIXELS} allowed")
            _load(image, content)
            if upright:
                _turn_upright(image)
            return _as_rgb(image)
    except MemoryError:
        raise ValueError(f"{where}: unreadable image (more than fits into memory)") from None
    # Pillow raises many kinds of errors for damage, depending on the format.
    except Exception as error:
        reason: object = error
        if isinstance(error, UnidentifiedImageError):
            reason = f"not a {', '.join(formats[:-1])} or {formats[-1]}"
        raise ValueError(f"{where}: unreadable image ({reason})") from error


def kept_extension(content: bytes) -> str | None:
    """The extension with which an encoded picture can be put into a shard as it is.

    None when its format cannot, and when it is transparent or would have to be turned.
    """
    with _opened(content, FORMATS) as image:
        if _is_upright(image) and not image.has_transparency_data:
            return MEMBERS.get(image.format or "")
    return None


def _opened(content: bytes, formats: tuple[str, ...]) -> ImageFile.ImageFile:
    if "JPEG" in formats and content.startswith(jpegs.START):
        # Image.open would make another format of pictures by some cameras: MPO, several
        # JPEGs in one file, of which all readers show the first.
        try:
            return JpegImageFile(io.BytesIO(content))
        except SyntaxError as error:  # Pillow's for damage
            raise ValueError(f"its header is damaged: {error}") from None
    return Image.open(io.BytesIO(content), formats=formats)


def _load(image: ImageFile.ImageFile, content: bytes) -> None:
    """Load the pixels. Raises ValueError for damage that Pillow lets pass."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # some libraries switch it on for the whole process
    if isinstance(image, JpegImageFile):
        jpegs.load(image, content)
        return
    if image.format == "PNG":
        damage.check_png(content)
        _scale_transparent_grey(image)
        if image.tile[0][3] == "RGB;16B" and "transparency" in image.info:
            _whiten_transparent_color(image, content)
    image.load()
    if image.format == "PNG":
        damage.check_png_rows(image, content)
    if image.format == "WEBP":
        damage.check_webp(content)
    if image.format == "TIFF":
        damage.check_tiff(image, content, MAX_PIXELS)


def _scale_transparent_grey(image: ImageFile.ImageFile) -> None:
    """Pillow makes 8 bits of a PNG's grey levels of 2 or 4, but not of the one that is
    transparent.
    """
    raw_mode = image.tile[0][3]
    if raw_mode in ("L;2", "L;4") and "transparency" in image.info:
        image.info["transparency"] *= 255 // (2 ** int(raw_mode[-1]) - 1)


def _whiten_transparent_color(image: ImageFile.ImageFile, content: bytes) -> None:
    """Load a PNG of 16 bits a channel, with the transparent colour white.

    Pillow keeps the upper 8 bits, and compares them with the lower ones of that colour.
    """
    color = image.info.pop("transparency")
    with Image.open(io.BytesIO(content), formats=["PNG"]) as lower:
        # As if the bytes were in the other order, which gives the lower 8 bits.
        lower.tile = [lower.tile[0]._replace(args="RGB;16L")]
        is_transparent = np.ones((image.height, image.width), bool)
        for upper_bits, lower_bits, level in zip(image.split(), lower.split(), color, strict=True):
            is_transparent &= np.asarray(upper_bits) == level >> 8
            is_transparent &= np.asarray(lower_bits) == level & 255
    image.paste("white", mask=Image.fromarray(is_transparent))


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _grey_from_16_bits(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"grey levels of mode {image.mode}; expected 8, 12 or 16 bits without a sign")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy


def _grey_from_16_bits(image: Image.Image) -> Image.Image:
    """Pillow's own conversion cuts everything brighter than 255."""
    levels = np.asarray(image).astype(np.uint32)
    bits, is_inverted = 16, False
    if image.format == "TIFF":  # 12 bits have this mode too
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits, is_inverted = tags.get(258, (16,))[0], tags.get(262) == 0
    grey = (levels * 255 // (2**bits - 1)).astype(np.uint8)
    if is_inverted:
        grey = 255 - grey
    if "transparency" in image.info:
        grey[levels == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")


def _turn_upright(image: Image.Image) -> None:
    """Turn a picture, in place, as its EXIF orientation says."""
    try:
        # In place: an error in the other EXIF tags comes after the turn and must not
        # undo it.
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # damaged EXIF; the picture itself may be good
        pass


def _is_upright(image: Image.Image) -> bool:
    """Whether the EXIF orientation leaves the picture as it is, or is absent or
    unreadable.
    """
    try:
        return image.getexif().get(0x0112, 1) == 1
    except Exception:  # damaged EXIF; the picture itself may be good
        return True


# ---- pictures of samples ---------------------------------------------------------------------


def encoded_picture(sample: Sample, where: str) -> bytes:
    """A sample's picture, still encoded.

    Raises ValueError unless there is exactly one.
    """
    names = [name for name in IMAGE_EXTENSIONS if name in sample.members]
    if len(names) != 1:
        raise ValueError(
            f"{where}: expected one of {', '.join(IMAGE_EXTENSIONS)}, found {', '.join(names) or 'none'}"
        )
    return sample.members[names[0]]


def sample_picture(sample: Sample, where: str, image_size: int) -> Image.Image:
    """A sample's picture as RGB.

    Raises ValueError when it is damaged or does not have the size that the manifest
    says.
    """
    image = decode_picture(encoded_picture(sample, where), where, formats=SHARD_FORMATS)
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

    The picture is halved while its shorter side is at least twice image_size, then
    resized with bicubic weights, enlarged if necessary. The pictures that ADM and
    LlamaGen were trained on were made like this (center_crop_arr).

    Args:
        shares: Parts of the surplus that are cut at the left and at the top; the
            default is the centre.
    """
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if max(image.size) > 8 * min(image.size):
        # Scaling a line of 1 x 60,000 pixels as a whole would take gigabytes, so the
        # surplus is cut first.
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
