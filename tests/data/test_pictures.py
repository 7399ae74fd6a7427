"""One function opens pictures: data tools and evaluators see the same pixels of any
kind of file.
"""

import io
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval import layout
from eval.dpg_bench.pictures import Item
from eval.fid import sources
from mmtensorar.data import pictures
from mmtensorar.data.pictures import decode_picture, open_picture
from tests.helpers.pictures import encoded, photograph, png, tiff
from tests.helpers.sources import made, make

ROOT = Path(__file__).resolve().parents[2]
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
GREY = np.repeat(RAMP[..., None], 3, axis=2)
RED = np.full((16, 16, 3), (255, 0, 0), np.uint8)
HALF_WHITE = RED.copy()
HALF_WHITE[:, 8:] = 255


def animated(kind: str, mode: str = "RGB") -> bytes:
    frames = [Image.new(mode, (16, 16), color) for color in ("red", "lime", "blue")]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)


def half_transparent() -> Image.Image:
    """Red, with a right half that is transparent, and black under that."""
    image = Image.new("RGBA", (16, 16), "red")
    image.paste((0, 0, 0, 0), (8, 0, 16, 16))
    return image


def palette_of_red_and_black() -> Image.Image:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([255, 0, 0, 0, 0, 0])
    image.paste(1, (8, 0, 16, 16))
    return image


def turned(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(GREY).transpose(Image.Transpose.ROTATE_90)
    return encoded(picture, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


def rows(levels: np.ndarray, bits: int) -> list[bytes]:
    """Rows of a PNG with `bits` bits for each level."""
    if bits == 16:
        return [row.astype(">u2").tobytes() for row in levels]
    places = np.arange(bits)[::-1]
    return [np.packbits((row[:, None] >> places) & 1).tobytes() for row in levels.astype(np.uint8)]


FEW = np.tile(np.arange(16) % 4, (16, 1))  # levels of 2 bits
FEW_WITH_WHITE = np.repeat(np.where(FEW == 1, 255, FEW * 85).astype(np.uint8)[..., None], 3, axis=2)
WIDE = RAMP.astype(np.uint32) * 257
WITHOUT_10 = np.repeat(np.where(RAMP == 10, 255, RAMP)[..., None], 3, axis=2)
PALETTE = Image.fromarray(GREY).quantize(4)

# name -> content of a file, and the 8-bit RGB pixels that it stands for
KINDS: dict[str, tuple[bytes, np.ndarray]] = {
    "grey of 16 bits": (encoded(Image.fromarray(WIDE.astype(np.uint16)), "PNG"), GREY),
    "grey of 16 bits, one transparent": (
        png((16, 16), 16, 0, rows(WIDE, 16), struct.pack(">H", 2570)),
        WITHOUT_10,
    ),
    "grey of 8 bits, one transparent": (
        png((16, 16), 8, 0, [row.tobytes() for row in RAMP], b"\0\n"),
        WITHOUT_10,
    ),
    "grey of 2 bits, one transparent": (png((16, 16), 2, 0, rows(FEW, 2), b"\0\1"), FEW_WITH_WHITE),
    "grey of 2 bits": (
        png((16, 16), 2, 0, rows(FEW, 2)),
        np.repeat((FEW * 85).astype(np.uint8)[..., None], 3, 2),
    ),
    "grey of 4 bits, one transparent": (
        png((16, 16), 4, 0, rows(RAMP % 16, 4), b"\0\3"),
        np.repeat(np.where(RAMP % 16 == 3, 255, RAMP % 16 * 17).astype(np.uint8)[..., None], 3, 2),
    ),
    "1 bit": (
        encoded(Image.fromarray(RAMP > 99), "PNG"),
        np.repeat(((RAMP > 99) * 255).astype(np.uint8)[..., None], 3, 2),
    ),
    "RGB of 16 bits, one transparent": (
        png((16, 16), 16, 2, rows(np.repeat(WIDE, 3, axis=1), 16), struct.pack(">H", 2570) * 3),
        WITHOUT_10,
    ),
    "RGBA": (encoded(half_transparent(), "PNG"), HALF_WHITE),
    "RGBA in WEBP": (encoded(half_transparent(), "WEBP", lossless=True), HALF_WHITE),
    "palette, one transparent": (encoded(palette_of_red_and_black(), "PNG", transparency=1), HALF_WHITE),
    "GIF, one transparent": (encoded(half_transparent(), "GIF"), HALF_WHITE),
    "grey with alpha": (
        encoded(Image.merge("LA", (Image.fromarray(RAMP), Image.new("L", (16, 16), 255))), "PNG"),
        GREY,
    ),
    "palette": (encoded(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB"))),
    "CMYK": (encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "TIFF"), RED),
    "BMP": (encoded(Image.fromarray(GREY), "BMP"), GREY),
    "grey TIFF of 16 bits": (tiff((16, 16), 16, 1, WIDE.astype("<u2").tobytes()), GREY),
    "grey TIFF of 16 bits, white is 0": (tiff((16, 16), 16, 0, (65535 - WIDE).astype("<u2").tobytes()), GREY),
    "grey TIFF of 8 bits, white is 0": (tiff((16, 16), 8, 0, (255 - RAMP).tobytes()), GREY),
    "TIFF of two pages": (
        encoded(Image.fromarray(GREY), "TIFF", save_all=True, append_images=[Image.new("RGB", (4, 4))]),
        GREY,
    ),
    "animated GIF": (animated("GIF"), RED),
    "animated PNG": (animated("PNG"), RED),
    "animated WEBP": (animated("WEBP"), RED),
    **{f"{kind}, turned": (turned(kind, 6), GREY) for kind in ("PNG", "WEBP", "TIFF")},
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory) -> tuple[Path, np.ndarray]:
    """A file of the kind, alone in a folder, and its pixels."""
    content, expected = KINDS[request.param]
    with Image.open(io.BytesIO(content)) as image:
        path = tmp_path_factory.mktemp("kind") / f"a.{(image.format or '').lower()}"
    path.write_bytes(content)
    return path, expected


def test_evaluators_see_the_picture_that_8_bits_would_give(kind, tmp_path):
    """Grey of 16 bits used to become white in evaluators, and transparent parts
    black.
    """
    path, expected = kind
    Image.fromarray(expected).save(tmp_path / "a.png")
    for folder in (path.parent, tmp_path):
        (batch,) = sources.find(folder).batches(1)
        np.testing.assert_array_equal(batch, expected[None])
    np.testing.assert_array_equal(np.asarray(layout.open_image(path)), expected)
    np.testing.assert_array_equal(np.asarray(Item("a", [path], False).samples(1)[0]), expected)


def test_data_tools_see_the_same(kind, tmp_path):
    path, expected = kind
    path.with_suffix(".txt").write_text("a picture")
    assert make(tmp_path / "set", "--folder", path.parent, "--format", "png") == 0
    (sample,) = made(tmp_path / "set")
    np.testing.assert_array_equal(np.asarray(decode_picture(sample.members["png"], "")), expected)


@pytest.mark.parametrize("bits", [12, 16])
def test_grey_levels_that_8_bits_do_not_have_are_rounded_down(bits):
    levels = np.linspace(0, 2**bits - 1, 64).astype(np.uint32).reshape(8, 8)
    if bits == 12:
        pairs = levels.reshape(-1, 2)
        packed = np.stack(
            [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1
        )
        content = tiff((8, 8), 12, 1, packed.astype(np.uint8).tobytes())
    else:
        content = encoded(Image.fromarray(levels.astype(np.uint16)), "PNG")
    found = np.asarray(decode_picture(content, ""))
    np.testing.assert_array_equal(found[..., 0], levels * 255 // (2**bits - 1))


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (Image.new("F", (4, 4), 0.5), "TIFF"),
        (Image.new("I", (4, 4), 70_000), "TIFF"),
        (photograph(), "JPEG2000"),
        (photograph(), "PPM"),
        (photograph(), "ICO"),
        (photograph(), "TGA"),
        (photograph(), "PCX"),
    ],
)
def test_what_cannot_be_read_the_same_everywhere_is_refused(image, kind, tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(image, kind))
    with pytest.raises(ValueError, match=r"a.png: unreadable image \((not a JPEG, PNG|grey levels of mode)"):
        layout.open_image(tmp_path / "a.png")


def test_sizes_are_bounded_before_decoding(tmp_path, monkeypatch):
    for kind in ("PNG", "GIF"):
        with pytest.raises(ValueError, match="9450x9450 pixels, more than"):
            decode_picture(encoded(Image.new("1", (9450, 9450)), kind), "here")
    with pytest.raises(ValueError, match="is missing"):
        open_picture(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="cannot be read"):
        open_picture(tmp_path)
    monkeypatch.setattr(pictures, "MAX_BYTES", 100)
    (tmp_path / "a.png").write_bytes(encoded(photograph(), "PNG"))
    with pytest.raises(ValueError, match="a.png: .* bytes, more than the 100 allowed"):
        open_picture(tmp_path / "a.png")


def test_nothing_else_opens_pictures():
    """The benchmark compares with Pillow alone.

    Pictures of shards have the three formats of shards only.
    """
    allowed = {"mmtensorar/data/pictures.py", "mmtensorar/data/damage.py", "benchmarks/data.py"}
    packages = ("mmtensorar", "data_tools", "eval", "study", "worlds", "benchmarks")
    found = {
        path.relative_to(ROOT).as_posix()
        for package in packages
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"Image\.open\(|imread\(|JpegImageFile\(", path.read_text())
    }
    assert found == allowed
    assert set(pictures.MEMBERS) == set(pictures.SHARD_FORMATS)


@pytest.mark.parametrize(
    "color, expected",
    [
        ((0x1234, 0, 0), [255, 18, 0]),
        ((0x1200, 0, 0), [18, 255, 0]),
        ((0x0012, 0, 0), [18, 18, 0]),
        ((0, 0, 0), [18, 18, 255]),
        ((0x1234, 0, 1), [18, 18, 0]),
    ],
)
def test_the_transparent_colour_of_16_bits_is_compared_whole(color, expected):
    """Pillow compares the lower 8 bits of it with the upper ones of pixels."""
    row = struct.pack(">9H", 0x1234, 0, 0, 0x1200, 0, 0, 0, 0, 0)
    content = png((3, 1), 16, 2, [row], struct.pack(">3H", *color))
    pixels = np.asarray(decode_picture(content, "a.png"))[0]
    assert pixels[:, 0].tolist() == expected
    assert pixels[:, 1].tolist() == [255 * (level == 255) for level in expected]
    assert pictures.kept_extension(content) is None
