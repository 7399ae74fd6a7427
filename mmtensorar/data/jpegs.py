"""JPEG: decode, and recognise pictures of which a part is missing.

libjpeg fills in what is missing and only warns, and Pillow does not pass the warning
on. So the decoder is fed here piece by piece. It must ask for more bytes before the end
of each scan, and must not need more after it. This costs no second decoding.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

START = b"\xff\xd8\xff"
RESTARTS = range(0xD0, 0xD8)
DHT, END, SOS, DRI = 0xC4, 0xD9, 0xDA, 0xDD
# Sequential and progressive frames with Huffman codes. Arithmetic codes may end early,
# and the decoder cannot wait for the rest of them.
SEQUENTIAL, PROGRESSIVE = (0xC0, 0xC1), 0xC2
FRAMES = (*SEQUENTIAL, PROGRESSIVE)

SURPLUS = 64  # bytes after the last pixel that are taken for data of lost pixels, not for padding
ZEROS = 64  # bytes
# A code of ones is no Huffman code, so that ones never complete more than a few blocks.
# The decoder reads up to 8 bytes ahead.
ONE = b"\xff\x00"
_AFTER_END = (12 * ONE + b"\xff", b"\x00" + 9 * ONE + b"\xff", b"\x00" + 10 * ONE + b"\xff")


class Scan(NamedTuple):
    """A run of entropy-coded data.

    start, end: its place in the file; end is None when no marker follows. components:
    their numbers. band: first and last coefficient. bits: successive approximation,
    high and low.
    first_symbols: of each table of AC codes, the symbol whose code is all zeros.
    interval: of restart markers, in units of num_units, 0 without markers.
    """

    start: int
    end: int | None
    components: tuple[int, ...]
    band: tuple[int, int]
    bits: tuple[int, int]
    first_symbols: tuple[int, ...]
    interval: int


@dataclass
class Structure:
    """The markers of a file, as far as they matter here.

    frame: SOF marker. samplings: component -> horizontal and vertical. end: place after
    the end marker, None without one.
    """

    frame: int = 0
    size: tuple[int, int] = (0, 0)
    samplings: dict[int, tuple[int, int]] = field(default_factory=dict)
    scans: list[Scan] = field(default_factory=list)
    end: int | None = None

    @property
    def is_single(self) -> bool:
        """Whether the decoder writes pixels while it reads the one scan."""
        return (
            self.frame in SEQUENTIAL
            and bool(self.scans)
            and len(self.scans[0].components) == len(self.samplings)
        )

    def num_units(self, scan: Scan) -> int:
        """Number of MCUs of a scan, between which restart markers are counted."""
        across, down = (max(pair[axis] for pair in self.samplings.values()) for axis in (0, 1))
        own = self.samplings[scan.components[0]] if len(scan.components) == 1 else (1, 1)
        return -(-self.size[0] * own[0] // (8 * across)) * -(-self.size[1] * own[1] // (8 * down))


# ---- markers ---------------------------------------------------------------------------------

_MARKER = re.compile(rb"\xff[^\x00\xff]")
_SCAN_END = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")


def read_structure(content: bytes) -> Structure:
    """The structure up to the end marker.

    Raises IndexError, KeyError or ValueError when it is invalid.
    """
    found, tables, interval = Structure(), {}, 0
    position = 2
    while (position := content.find(b"\xff", position)) >= 0 and position + 1 < len(content):
        marker = content[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        position += 2
        if marker == END:
            found.end = position
            break
        if marker in (0x00, 0x01, *RESTARTS):  # without parameters
            continue
        length = int.from_bytes(content[position : position + 2], "big")
        body = content[position + 2 : position + length]
        position += length
        if marker in FRAMES:
            found.frame, found.size, found.samplings = marker, *_frame(body)
        elif marker == DHT:
            tables |= _first_symbols(body)
        elif marker == DRI:
            interval = int.from_bytes(body[:2], "big")
        elif marker == SOS:
            end = (_SCAN_END if interval else _MARKER).search(content, position)
            found.scans.append(_scan(body, position, end.start() if end else None, tables, interval))
            if end is None:
                break
            position = end.start()
            if found.is_single:  # what follows is not read
                found.end = position + 2
                break
    return found


def _frame(body: bytes) -> tuple[tuple[int, int], dict[int, tuple[int, int]]]:
    height, width, number = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big"), body[5]
    parts = [body[6 + 3 * index : 9 + 3 * index] for index in range(number)]
    return (width, height), {part[0]: (max(1, part[1] >> 4), max(1, part[1] & 15)) for part in parts}


def _first_symbols(body: bytes) -> dict[int, int]:
    """Number of a table of AC codes -> the symbol whose code is all zeros."""
    found, position = {}, 0
    while position + 17 < len(body):
        if body[position] >> 4 == 1:
            found[body[position] & 15] = body[position + 17]
        position += 17 + sum(body[position + 1 : position + 17])
    return found


def _scan(body: bytes, start: int, end: int | None, tables: dict[int, int], interval: int) -> Scan:
    number = body[0]
    components = tuple(body[1 + 2 * index] for index in range(number))
    used = {body[2 + 2 * index] & 15 for index in range(number)}
    first, last, bits = body[1 + 2 * number : 4 + 2 * number]
    symbols = tuple(tables[table] for table in sorted(used) if table in tables)
    return Scan(start, end, components, (first, last), (bits >> 4, bits & 15), symbols, interval)


# ---- checks of the encoded data --------------------------------------------------------------


def check_scans(content: bytes, structure: Structure) -> None:
    """Raises ValueError for what shows without decoding that data are missing."""
    for number, scan in enumerate(structure.scans, 1):
        name = "its data" if len(structure.scans) == 1 else f"scan {number} of {len(structure.scans)}"
        _check_restarts(content, structure, scan, name)
        if _has_no_long_zeros(structure, scan) and content.find(bytes(ZEROS), scan.start, scan.end) >= 0:
            raise ValueError(f"{name} has a gap: {ZEROS} zero bytes or more")
    if not structure.is_single:
        _check_coverage(structure)


def _check_restarts(content: bytes, structure: Structure, scan: Scan, name: str) -> None:
    if not scan.interval:
        return
    stop = len(content) if scan.end is None else scan.end
    numbers = [content[found.end() - 1] & 7 for found in _RESTART.finditer(content, scan.start, stop)]
    if numbers != [index % 8 for index in range(len(numbers))]:
        raise ValueError(f"{name} has restart markers out of order")
    expected = -(-structure.num_units(scan) // scan.interval) - 1
    # Some encoders write one more after the last block.
    if scan.end is not None and not expected <= len(numbers) <= expected + 1:
        raise ValueError(f"{name} has {len(numbers)} restart markers; expected {expected}")


def _has_no_long_zeros(structure: Structure, scan: Scan) -> bool:
    """Whether many zero bits never occur in a scan's data.

    They do where the code of a block that is like the one before is all zeros, as in
    tables made for pictures with large areas of one colour. Otherwise they mean
    hundreds of coefficients of one small value. Refinements are bits of the picture
    itself.
    """
    if structure.frame == PROGRESSIVE and (scan.band[0] == 0 or scan.bits[0] > 0):
        return False
    return any(symbol & 15 or symbol == 0xF0 for symbol in scan.first_symbols)


def _check_coverage(structure: Structure) -> None:
    """Raises ValueError unless the scans bring each coefficient to its last bit, in
    order.
    """
    last = 63 if structure.frame == PROGRESSIVE else 0
    left: dict[tuple[int, int], int] = {}  # component, coefficient -> bits that are still missing
    for number, scan in enumerate(structure.scans, 1):
        high, low = scan.bits if structure.frame == PROGRESSIVE else (0, 0)
        for key in product(scan.components, range(scan.band[0], scan.band[1] + 1)):
            if left.get(key, 0) != high:
                raise ValueError(f"scan {number} of {len(structure.scans)} does not fit those before it")
            left[key] = low
    if any(left.get(key, 1) for key in product(structure.samplings, range(last + 1))):
        raise ValueError(f"truncated: the {len(structure.scans)} scans do not make a whole picture")


# ---- decoding --------------------------------------------------------------------------------


class _Decoder:
    """Pillow's decoder of an open picture, which is fed by hand."""

    def __init__(self, image: JpegImageFile):
        image.load_prepare()
        codec, extents, _, arguments = image.tile[0]
        self.decoder: Any = Image._getdecoder(image.mode, codec, arguments, image.decoderconfig)
        self.decoder.setimage(image.im, extents)
        self.left = b""
        self.is_done = False

    def feed(self, content: bytes) -> int:
        """Give it more bytes; returns how many it has not used yet."""
        if self.is_done:
            return 0
        self.left += content
        used, error = self.decoder.decode(self.left)
        if error < 0:
            raise ValueError("broken data stream")
        self.is_done = used < 0
        self.left = b"" if self.is_done else self.left[used:]
        return len(self.left)


def load(image: JpegImageFile, content: bytes) -> None:
    """Load the pixels of an open picture, like image.load().

    content: the whole file.

    Raises ValueError when data are missing, or more than the pixels need. Not
    recognised are missing bits of the last few blocks, and changed bits after which the
    number of blocks is right by chance.
    """
    try:
        structure = read_structure(content)
    except (IndexError, KeyError, ValueError):
        structure = Structure()
    if not structure.scans or not structure.samplings:  # another kind, or invalid: Pillow judges
        image.load()
        return
    check_scans(content, structure)
    decoder = _Decoder(image)
    try:
        if structure.is_single:
            _load_single(decoder, content, structure.scans[0])
        else:
            _load_several(decoder, content, structure)
    finally:
        decoder.decoder.cleanup()
    image.tile = []


def _load_single(decoder: _Decoder, content: bytes, scan: Scan) -> None:
    if scan.end is None:
        data = content.rstrip(b"\0")  # of a download that reserved the space
        decoder.feed(content if len(content) - len(data) < ZEROS else data)
    else:
        stop = _before_end(content, scan)
        decoder.feed(content[:stop])
        if decoder.is_done and stop > scan.start:
            raise ValueError("its data have more blocks than its size; part of them is damaged")
        decoder.feed(content[stop : scan.end] + 8 * ONE)
    if not decoder.is_done:
        raise ValueError("truncated: its data ends early")


def _load_several(decoder: _Decoder, content: bytes, structure: Structure) -> None:
    """The decoder writes pixels after the end marker, so the end of a scan shows in
    what it leaves unused.

    After the last block it skips everything up to the next marker. Before that it
    fetches 6 to 8 bytes at a time, when it needs some, and cannot use fewer.
    """
    position, pending = 0, b""
    for number, scan in enumerate(structure.scans, 1):
        if scan.end is None:
            break
        name = f"scan {number} of {len(structure.scans)}"
        stop = _before_end(content, scan)
        if stop > scan.start and not scan.interval:  # at restart markers it does not fetch ahead
            decoder.feed(pending + content[position:stop])
            if max(decoder.feed(content[place : place + 3]) for place in (stop, stop + 3)) <= 1:
                raise ValueError(f"{name} has more blocks than its size; part of it is damaged")
            position, pending = stop + 6, b""
        decoder.feed(pending + content[position : scan.end])
        # The first byte of a marker is left, and nothing else.
        if any(decoder.feed(piece) != 1 for piece in _AFTER_END):
            raise ValueError(f"truncated: {name} ends early")
        position, pending = scan.end, b"\0"
    decoder.feed(pending + content[position : structure.end])
    if not decoder.is_done:
        raise ValueError("truncated: it has no end marker")


def _before_end(content: bytes, scan: Scan) -> int:
    """A place from which on a scan's data must be needed, its start when it is too
    short to tell.
    """
    assert scan.end is not None
    data = content[scan.start : scan.end]
    useful = len(data.rstrip(b"\xff"))  # a marker may follow any number of these
    return scan.start + (useful - SURPLUS if useful > 2 * SURPLUS else 0)
