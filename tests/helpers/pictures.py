"""Encoded pictures of many kinds, and ways to damage them."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

END = b"\xff\xd9"  # of a JPEG


def photograph(width: int = 96, height: int = 80, seed: int = 0, noise: int = 12) -> Image.Image:
    """A smooth picture with some noise, like a photograph in its data."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8))
    pixels = np.asarray(smooth.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    pixels = pixels + rng.integers(-noise, noise + 1, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(size: tuple[int, int], bits: int, color: int, rows: list[bytes], transparent: bytes = b"") -> bytes:
    """A PNG from its packed rows.

    color: 0 is grey, 2 RGB, 3 palette. transparent: the tRNS chunk.
    """

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", *size, bits, color, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"tRNS", transparent) if transparent else b""]
        + [chunk(b"IDAT", data), chunk(b"IEND", b"")]
    )


def tiff(size: tuple[int, int], bits: int, photometric: int, data: bytes) -> bytes:
    """An uncompressed grey TIFF. photometric: 0 when white is zero, 1 when black is."""
    values = {256: size[0], 257: size[1], 258: bits, 259: 1, 262: photometric}
    values |= {273: 8 + 2 + 12 * 9 + 4, 277: 1, 278: size[1], 279: len(data)}
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(values)) + tags + bytes(4) + data


def data_start(jpeg: bytes) -> int:
    """Where the data of a JPEG's first scan begin."""
    place = jpeg.index(b"\xff\xda") + 2
    return place + int.from_bytes(jpeg[place : place + 2], "big")


def place_in(content: bytes, share: float) -> int:
    """A place in a picture's data: of a JPEG, between the headers and the end
    marker.
    """
    start = data_start(content) if content.startswith(b"\xff\xd8") else 0
    return start + int((len(content) - 2 - start) * share)


def closed(content: bytes, share: float = 0.5) -> bytes:
    """A JPEG of which the rest is missing, with an end marker: what repair tools
    make.
    """
    return content[: place_in(content, share)].rstrip(b"\xff") + END


def zeroed(content: bytes, share: float = 0.5) -> bytes:
    """The file as a download that reserved its space leaves it."""
    place = place_in(content, share)
    return content[:place] + bytes(len(content) - place)


def zeroed_inside(content: bytes, begin: float = 0.4, end: float = 0.6) -> bytes:
    """One part of the file has not been downloaded."""
    first, last = place_in(content, begin), place_in(content, end)
    return content[:first] + bytes(last - first) + content[last:]


def without_middle(content: bytes, begin: float = 0.4, end: float = 0.6) -> bytes:
    return content[: place_in(content, begin)] + content[place_in(content, end) :]


def repeated(content: bytes, begin: float = 0.4, end: float = 0.6) -> bytes:
    """A part was written twice."""
    return content[: place_in(content, end)] + content[place_in(content, begin) :]


def webp_closed(content: bytes, share: float = 0.5) -> bytes:
    """A WEBP of one chunk of which the rest is missing, with lengths that fit."""
    data = content[20 : int(len(content) * share) // 2 * 2]
    chunk = content[12:16] + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk
