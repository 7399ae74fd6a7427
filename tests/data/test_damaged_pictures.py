"""Pictures that lost data and open all the same are errors, and good ones never are.

Decoders fill up what is missing: a JPEG with grey, a PNG with black, a WEBP by
smearing. Such pictures used to be kept, with up to half of their pixels wrong.
"""

import io
import zlib
from functools import partial

import numpy as np
import pytest
from PIL import Image, ImageFile, features

from mmtensorar.data import damage, jpegs
from mmtensorar.data.pictures import decode_picture
from tests.helpers import pictures
from tests.helpers.pictures import encoded, photograph

PROGRESSIVE = {"progressive": True}
OPTIONS = {
    "plain": {},
    "best": {"quality": 100, "subsampling": 0},
    "small": {"quality": 30, "optimize": True},
    "progressive": PROGRESSIVE,
    "progressive, whole chroma": {"quality": 95, "subsampling": 0} | PROGRESSIVE,
    "restarts": {"restart_marker_blocks": 5},
    "restarts, progressive": {"restart_marker_rows": 1} | PROGRESSIVE,
}
DAMAGES = {
    "closed": pictures.closed,
    "closed late": partial(pictures.closed, share=0.93),
    "zeroed": pictures.zeroed,
    "zeroed and closed": lambda content: pictures.zeroed(content)[:-2] + pictures.END,
    "zeroed inside": pictures.zeroed_inside,
    "without middle": pictures.without_middle,
    "repeated": pictures.repeated,
}


def opens_wrong(content: bytes, good: bytes) -> bool:
    """Whether Pillow alone takes a picture for complete, though pixels differ."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            found = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError):
        return False
    return not np.array_equal(found, np.asarray(decode_picture(good, "")))


def plain(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


# ---- JPEG ------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_damaged_jpegs(mode, options, damage):
    good = encoded(photograph().convert(mode), "JPEG", **OPTIONS[options])
    with pytest.raises(ValueError, match=r"^here: unreadable image \(.+\)$"):
        decode_picture(DAMAGES[damage](good), "here")


def test_pillow_alone_takes_many_of_them():
    """Otherwise the tests above prove nothing."""
    kinds = [encoded(photograph(), "JPEG", **options) for options in OPTIONS.values()]
    passed = [opens_wrong(damage(good), good) for good in kinds for damage in DAMAGES.values()]
    assert sum(passed) > len(passed) / 2


def in_several_scans() -> bytes:
    """A sequential JPEG with one scan per component, made of three grey ones."""
    channels = photograph().convert("YCbCr").split()
    files = [encoded(channel, "JPEG", quality=75) for channel in channels]
    frame = files[0].index(b"\xff\xc0")
    head, tables = files[0][:frame], files[0][frame + 13 : pictures.data_start(files[0]) - 10]
    parts = b"".join(bytes([number, 0x11, 0]) for number in (1, 2, 3))
    content = head + b"\xff\xc0\x00\x11" + files[0][frame + 4 : frame + 9] + b"\x03" + parts + tables
    for number, file in enumerate(files, 1):
        content += b"\xff\xda\x00\x08\x01" + bytes([number, 0, 0, 63, 0])
        content += file[pictures.data_start(file) : -2]
    return content + pictures.END


@pytest.mark.parametrize("damage", DAMAGES)
def test_jpegs_with_one_scan_per_component(damage):
    good = in_several_scans()
    assert np.array_equal(plain(good), np.asarray(decode_picture(good, "")))
    assert len(jpegs.read_structure(good).scans) == 3
    with pytest.raises(ValueError, match="^here: unreadable image"):
        decode_picture(DAMAGES[damage](good), "here")


def test_missing_scans_and_restart_markers():
    """A progressive file that stops between two scans is a blurred picture, which no
    decoder warns of.
    """
    good = encoded(photograph(), "JPEG", **PROGRESSIVE)
    scans = jpegs.read_structure(good).scans
    for scan in scans[:-1]:
        with pytest.raises(ValueError, match="the . scans do not make a whole picture|early"):
            decode_picture(good[: scan.end] + pictures.END, "here")
    good = encoded(photograph(), "JPEG", restart_marker_rows=1)
    first, second = good.index(b"\xff\xd0"), good.index(b"\xff\xd1")
    for bad in (
        good[:first] + good[second:],
        good[:second] + b"\xff\xd3" + good[second + 2 :],
        good[:first] + good[first + 2 :],
    ):
        with pytest.raises(ValueError, match="restart markers"):
            decode_picture(bad, "here")


MODES = ("RGB", "L", "CMYK")
SIZES = ((1, 1), (8, 8), (17, 33), (300, 5), (3, 200), (64, 64))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_good_jpegs_are_never_refused_nor_changed(progressive, subsampling):
    white = Image.new("RGB", (200, 200), "white")  # its optimal codes are long runs of zeros
    white.paste(photograph(40, 40), (9, 9))
    images = [Image.new("RGB", (160, 160), "red"), Image.new("L", (90, 90), 128), white]
    images += [photograph(*size, seed=9).convert(mode) for size in SIZES for mode in MODES]
    for number, image in enumerate(images):
        for quality in (1, 30, 75, 90, 95, 100):
            content = encoded(
                image,
                "JPEG",
                quality=quality,
                subsampling=subsampling,
                progressive=progressive,
                optimize=number % 2 == 0,
                restart_marker_blocks=(0, 3, 1000)[(number + quality) % 3],
            )
            assert np.array_equal(plain(content), np.asarray(decode_picture(content, "here")))


def test_what_is_around_the_picture_does_not_matter():
    """Thumbnails, profiles and comments in front, fill bytes, and whatever follows the
    end marker.
    """
    exif, thumbnail = Image.Exif(), encoded(photograph(16, 16), "JPEG")
    exif[0x010E] = "a description"
    content = encoded(
        photograph(), "JPEG", exif=exif.tobytes() + thumbnail, icc_profile=bytes(3000), comment=b"\xff\xd9"
    )
    expected = plain(content)
    for around in (
        content,
        content + bytes(5000),
        content + thumbnail + b"end of a motion photo",
        content[:-2] + b"\xff\xff\xff\xff" + pictures.END,
        content[:-2] + b"\xff\xfe\x00\x06text" + pictures.END,
        content + content,
    ):
        assert np.array_equal(expected, np.asarray(decode_picture(around, "here")))


def test_random_bytes_in_jpegs_are_a_sentence_or_a_picture():
    rng = np.random.default_rng(0)
    for options in OPTIONS.values():
        good = encoded(photograph(40, 30), "JPEG", **options)
        for _ in range(100):
            bad = bytearray(good)
            for place in rng.integers(2, len(bad), rng.integers(1, 6)):
                bad[place] = rng.integers(256)
            try:
                decode_picture(bytes(bad), "here")
            except ValueError as error:
                assert str(error).startswith("here: unreadable image (")


# ---- other formats ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "damage"),
    [
        ("PNG", {}, pictures.zeroed),
        ("PNG", {}, lambda content: pictures.zeroed(content)[:-12] + content[-12:]),
        ("PNG", {}, lambda content: content[:-12]),
        ("PNG", {}, lambda content: content[: len(content) // 2] + content[-12:]),
        ("PNG", {"compress_level": 0}, pictures.zeroed_inside),
        ("WEBP", {"quality": 90}, pictures.zeroed),
        ("WEBP", {"quality": 90}, pictures.webp_closed),
        ("WEBP", {"quality": 20}, lambda content: content[:-40]),
        ("WEBP", {"lossless": True}, pictures.zeroed),
        ("WEBP", {"lossless": True}, partial(pictures.webp_closed, share=0.9)),
        ("WEBP", {"quality": 90}, pictures.zeroed_inside),
        ("WEBP", {"quality": 20, "method": 0}, partial(pictures.zeroed_inside, begin=0.3)),
        ("WEBP", {"lossless": True, "quality": 50}, partial(pictures.zeroed_inside, end=0.45)),
        ("GIF", {}, lambda content: content[: len(content) // 2] + b"\0;"),
        ("GIF", {}, pictures.zeroed),
        ("BMP", {}, lambda content: content[:-1]),
        ("TIFF", {}, lambda content: content[: len(content) // 2]),
        ("TIFF", {"compression": "tiff_lzw"}, pictures.zeroed),
        ("TIFF", {"compression": "jpeg"}, pictures.zeroed_inside),
        ("TIFF", {"compression": "jpeg", "quality": 30}, partial(pictures.zeroed_inside, end=0.5)),
        ("TIFF", {"compression": "jpeg", "strip_size": 4000}, partial(pictures.zeroed_inside, end=0.44)),
        ("TIFF", {"compression": "tiff_adobe_deflate"}, partial(pictures.zeroed_inside, end=0.43)),
        ("TIFF", {"compression": "tiff_deflate", "tiffinfo": {317: 2}}, pictures.zeroed_inside),
    ],
)
def test_other_damaged_pictures(kind, options, damage):
    good = encoded(photograph(), kind, **options)
    assert decode_picture(good, "here").size == (96, 80)
    with pytest.raises(ValueError, match="^here: unreadable image"):
        decode_picture(damage(good), "here")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
def test_libraries_that_let_truncated_pictures_pass_do_not_matter(kind, monkeypatch):
    """Pillow has one switch for the whole process, which other packages set."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    content = encoded(photograph(), kind)
    with pytest.raises(ValueError, match="^here: unreadable image"):
        decode_picture(content[: len(content) // 2], "here")


def png_rows(height: int, bits: int, color: int, *, share: float) -> bytes:
    """A PNG, 24 pixels wide, of which only a share of the rows is there."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[color]
    rows = [bytes([0x55]) * (24 * bits * channels // 8)] * int(height * share)
    return pictures.png((24, height), bits, color, rows)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
@pytest.mark.parametrize(
    ("bits", "color"), [(8, 2), (8, 0), (1, 0), (2, 0), (16, 0), (16, 2), (8, 4), (8, 6), (16, 6)]
)
def test_missing_rows_of_pngs(bits, color, share):
    """All checksums are right and the data are whole, but the lower half was black."""
    decode_picture(png_rows(90, bits, color, share=1), "here")
    with pytest.raises(ValueError, match=r"^here: unreadable image \(.*truncated"):
        decode_picture(png_rows(90, bits, color, share=share), "here")


def interlaced(num_passes: int, pixel: int = 200) -> bytes:
    """A grey PNG of 16 x 16 pixels, with the first of its passes."""
    shapes = ((2, 2), (2, 2), (4, 2), (4, 4), (8, 4), (8, 8), (16, 8))[:num_passes]
    rows = [bytes([pixel]) * width for width, height in shapes for _ in range(height)]
    content = bytearray(pictures.png((16, 16), 8, 0, rows))
    content[28] = 1
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize("num_passes", range(1, 8))
def test_missing_passes_of_interlaced_pngs(num_passes):
    if num_passes == 7:
        assert np.all(np.asarray(decode_picture(interlaced(7), "here")) == 200)
    else:
        with pytest.raises(ValueError, match="truncated"):
            decode_picture(interlaced(num_passes), "here")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA", "RGBA", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (1, 30), (30, 1), (33, 20), (400, 300)])
def test_pngs_with_a_black_end_are_whole(mode, size):
    image = Image.new("RGBA", size)
    image.paste(photograph(size[0], (size[1] + 1) // 2), (0, 0))
    image = image.convert("L").convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
    content = encoded(image, "PNG")
    assert decode_picture(content, "here").size == size


def test_good_pngs_webps_and_tiffs_are_not_refused():
    """Large areas of one colour may be zeros in a WEBP or TIFF, and what follows a
    PNG's end is not the picture.
    """
    assert features.check("webp")
    white = Image.new("RGB", (700, 700), "white")
    half = white.copy()
    half.paste(photograph(300, 300), (0, 0))
    for image in (white, half, photograph(), photograph(1, 1)):
        for quality, method in ((1, 0), (80, 4), (100, 0)):
            decode_picture(encoded(image, "WEBP", quality=quality, method=method), "here")
        decode_picture(encoded(image, "WEBP", lossless=True), "here")
        for compression in ("jpeg", "tiff_adobe_deflate", "tiff_lzw", "packbits"):
            for mode in ("RGB", "L", "CMYK"):
                content = encoded(image.convert(mode), "TIFF", compression=compression, strip_size=9000)
                decode_picture(content, "here")
        content = encoded(image, "PNG")
        assert np.array_equal(
            np.asarray(decode_picture(content + b"rest of an older picture", "")), np.asarray(image)
        )


@pytest.mark.parametrize("side", [60_000, 20_000, 64])
def test_a_jpeg_in_a_tiff_that_is_larger_than_the_tiff_is_refused(side):
    """Its own header tells the size, and a small file could take gigabytes."""
    content = bytearray(encoded(photograph(32), "TIFF", compression="jpeg"))
    start = content.index(b"\xff\xc0") + 5  # of the height and width in the frame's header
    content[start : start + 4] = side.to_bytes(2, "big") * 2
    with pytest.raises(ValueError, match="a.tif: unreadable image|pixels"):
        decode_picture(bytes(content), "a.tif")


def test_each_part_of_a_tiff_has_a_limit_of_pixels():
    """Also where libtiff would not look at the part's size."""
    content = encoded(photograph(32), "TIFF", compression="jpeg")
    with Image.open(io.BytesIO(content)) as image:
        damage.check_tiff(image, content, max_pixels=32 * 80)
        with pytest.raises(ValueError, match="a part of 32x80 pixels, more than 2559"):
            damage.check_tiff(image, content, max_pixels=2559)
