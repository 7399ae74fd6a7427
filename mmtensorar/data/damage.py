"""PNG, WEBP and TIFF that have lost or changed data, and open all the same."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from mmtensorar.data import jpegs

ZEROS = 64  # bytes


def check_png(content: bytes) -> None:
    """Raises ValueError for a wrong checksum of a chunk that pixels depend on, and
    without an end chunk.

    Pillow does not check the sums of pixels, and fills up with black. Other chunks, and
    what follows the end chunk, may be damaged.
    """
    view, position = memoryview(content), 8
    while position + 12 <= len(content):
        length, kind = int.from_bytes(view[position : position + 4], "big"), bytes(view[position + 4 :][:4])
        end = position + 8 + length
        is_critical = not kind[0] & 32
        if is_critical and end + 4 <= len(content):
            if zlib.crc32(view[position + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
                raise ValueError(f"the {kind.decode(errors='replace')} chunk has a wrong checksum")
        if kind == b"IEND":
            return
        position = end + 4
    raise ValueError("truncated: it has no end chunk")


CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a PNG's colour types
# First column and row, and steps between columns and rows, of the passes of
# interlacing.
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def check_png_rows(image: Image.Image, content: bytes) -> None:
    """Raises ValueError when the rows of a PNG end early although its data are valid.

    Pillow leaves missing rows black, so that only a picture with a black end is
    unpacked once more, and one whose rows are interlaced. image: as Pillow loaded it.
    """
    width, height, bits, color, _, _, interlaced = struct.unpack(">IIBBBBB", content[16:29])
    if not interlaced and any(image.crop((0, height - 1, width, height)).tobytes()):
        return
    expected = 0
    for left, top, across, down in PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = max(0, width - left + across - 1) // across, max(0, height - top + down - 1) // down
        expected += rows * (1 + (columns * bits * CHANNELS[color] + 7) // 8) if columns else 0
    found, stream = 0, zlib.decompressobj()
    for data in _png_data(content):
        while data and not stream.eof and found < expected:
            found += len(stream.decompress(data, 2**20))
            data = stream.unconsumed_tail
    if found < expected:
        raise ValueError(f"truncated: {found} bytes of rows, expected {expected}")


def _png_data(content: bytes) -> Iterator[bytes]:
    """The packed rows, in the parts in which a PNG has them."""
    position = 8
    while position + 12 <= len(content):
        length = int.from_bytes(content[position : position + 4], "big")
        if content[position + 4 : position + 8] == b"IDAT":
            yield content[position + 8 : position + 8 + length]
        position += 12 + length


def check_webp(content: bytes) -> None:
    """Raises ValueError when the pixels' data hold many zeros in a row, and the decoder
    does not need their last bytes.

    Large areas of one colour may be coded as zeros too, but then all bytes are needed.
    Zeros in place of other data stand for more pixels than these did.
    """
    for kind, data in _webp_chunks(content):
        if kind not in (b"VP8 ", b"VP8L"):
            continue
        if bytes(ZEROS) not in data:
            continue
        shorter = data[: -ZEROS // 2]
        shorter += bytes(len(shorter) % 2)
        chunk = kind + len(shorter).to_bytes(4, "little") + shorter
        try:
            file = io.BytesIO(b"RIFF" + (len(chunk) + 4).to_bytes(4, "little") + b"WEBP" + chunk)
            with Image.open(file, formats=["WEBP"]) as image:
                image.load()
        except OSError:
            continue
        raise ValueError(f"its data has a gap: {ZEROS} zero bytes or more")


def _webp_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and data of the chunks of a picture, or of the first frame of an
    animation.
    """
    position = 12
    while position + 8 <= len(content):
        kind, length = (
            content[position : position + 4],
            int.from_bytes(content[position + 4 : position + 8], "little"),
        )
        if kind == b"ANMF":
            position += 8 + 16  # into the frame
            continue
        yield kind, content[position + 8 : position + 8 + length]
        position += 8 + length + length % 2


TABLES, STRIPS, TILES = 347, (273, 279), (324, 325)  # tags: of JPEG, and (places, numbers of bytes)


def check_tiff(image: Image.Image, content: bytes, max_pixels: int) -> None:
    """Raises ValueError when a strip or tile of a TIFF is a damaged JPEG, or one of more
    than max_pixels, or has a wrong checksum of deflate, which libtiff does not check.

    image: of its first page.
    """
    compression = image.info.get("compression")
    tags = image.tag_v2  # type: ignore[attr-defined]
    places, sizes = STRIPS if STRIPS[0] in tags else TILES
    for place, size in zip(tags.get(places, ()), tags.get(sizes, ()), strict=False):
        part = content[place : place + size]
        if compression == "jpeg":
            _check_jpeg_part(part, tags.get(TABLES, b""), max_pixels)
        elif compression in ("tiff_adobe_deflate", "tiff_deflate"):
            _check_deflated(part)


def _check_jpeg_part(part: bytes, tables: bytes, max_pixels: int) -> None:
    # Each part begins with a start marker, and the tables also end with an end marker.
    content = tables[:-2] + part[2:] if tables else part
    try:
        picture = JpegImageFile(io.BytesIO(content))
    except (SyntaxError, OSError):  # a kind that only libtiff opens
        return
    # Its own header may tell another size than the TIFF's, which was checked before.
    if picture.width * picture.height > max_pixels:
        raise ValueError(f"a part of {picture.width}x{picture.height} pixels, more than {max_pixels}")
    jpegs.load(picture, content)


def _check_deflated(part: bytes) -> None:
    stream = zlib.decompressobj()
    try:
        while part and not stream.eof:
            stream.decompress(part, 2**20)
            part = stream.unconsumed_tail
    except zlib.error as error:
        raise ValueError(f"its data are damaged: {error}") from None
