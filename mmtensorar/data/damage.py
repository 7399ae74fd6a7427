"""PNG and WEBP that have lost or changed data, and open all the same."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator

from PIL import Image

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


def check_webp(content: bytes) -> None:
    """Raises ValueError when the pixels' data end in zeros, of which the decoder does
    not need the last.

    Large areas of one colour may be coded as zeros too, but then all of them are
    needed.
    """
    for kind, data in _webp_chunks(content):
        if kind not in (b"VP8 ", b"VP8L"):
            continue
        num_zeros = len(data) - len(data.rstrip(b"\0"))
        if num_zeros < ZEROS:
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
        raise ValueError(f"its data has a gap: the last {num_zeros} bytes are zeros")


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
