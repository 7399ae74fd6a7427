"""Reading tars: plain files of one level, by their headers, so that any sample can be read without those before it.

What comes from outside is not believed: names, kinds and sizes of members are checked before a byte of content is read,
and nothing is extracted. Written here and not taken from tarfile because that has no way to start in the middle, and
takes a broken header for the end of the archive.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK = 512  # tar's unit: headers and padding
PLAIN, FOLDER, EXTENDED, GLOBAL, LONG_NAME = (b"0", b"\0"), b"5", b"x", b"g", b"L"
MAX_EXTENDED = 2**16  # bytes of an extended header


class Member(NamedTuple):
    """offset, size: of its content, in bytes. end: where the next header is."""

    name: str
    offset: int
    size: int
    end: int


class Damage(ValueError):
    """A tar that cannot be read on from some place."""


class opened:
    """A tar for the time of a with statement. path: on the disk, or a UPath. Raises Damage when the file is missing."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> opened:
        try:
            if isinstance(self.path, (str, Path)):
                self.file, self.stream = os.open(self.path, os.O_RDONLY), None
            else:
                self.file, self.stream = None, self.path.open("rb")
        except FileNotFoundError:
            raise Damage(f"{self.path}: the shard is missing") from None
        return self

    def __exit__(self, *exception: object) -> None:
        if self.stream is None:
            os.close(self.file)
        else:
            self.stream.close()

    def size(self) -> int:
        return os.fstat(self.file).st_size if self.stream is None else self.stream.seek(0, os.SEEK_END)

    def pread(self, num_bytes: int, offset: int) -> bytes:
        if self.stream is None:
            return os.pread(self.file, num_bytes, offset)
        self.stream.seek(offset)
        return self.stream.read(num_bytes)


def members(
    file: opened, path: Path, start: int = 0, stop: int | None = None, *, folders: bool = False
) -> Iterator[Member]:
    """Members from the header at start to that at stop, or to the end of the archive.

    folders: whether folders may be among them; they come as empty members whose names end in a slash.

    Raises Damage, naming the path and the member before, for a broken header, a member cut off, one that is no plain file,
    and an archive without its end. Content is not read.
    """
    size = file.size()
    place, last = start, "the start" if start == 0 else f"byte {start}"
    while stop is None or place < stop:
        header = file.pread(BLOCK, place)
        if header == bytes(BLOCK):
            _check_end(file, path, place, size, last)
            return
        found = _member(file, header, place, path, last, (*PLAIN, FOLDER) if folders else PLAIN)
        if found.offset + found.size > size:
            raise Damage(
                f"{path}: damaged or cut after {last} ({found.name} reaches beyond the end); make the shard again"
            )
        place, last = found.end, found.name
        yield found


def placed(file: opened, path: Path) -> Iterator[tuple[int, Member]]:
    """All members, each with where its first header is. Raises like `members`."""
    place = 0
    for member in members(file, path):
        yield place, member
        place = member.end


def _member(
    file: opened, header: bytes, place: int, path: Path, last: str, kinds: tuple[bytes, ...]
) -> Member:
    """The member whose header, or first of several headers, is given. kinds: that it may be of."""
    name = None
    size = None
    while True:
        kind = header[156:157]
        length = _checked_size(header, path, last)
        if kind in kinds:
            if name is None:
                prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
                name = _text(header[:100].partition(b"\0")[0], path, last)
                name = f"{_text(prefix, path, last)}/{name}" if prefix else name
            length = length if size is None else size
            offset = place + BLOCK
            return Member(name, offset, length, offset + -(-length // BLOCK) * BLOCK)
        if kind not in (EXTENDED, GLOBAL, LONG_NAME):
            name = _text(header[:100].partition(b"\0")[0], path, last).rstrip("/")
            raise Damage(
                f"{path}: sample {name.partition('.')[0]}: member {name} is a link, folder or device; expected a plain file"
            )
        if length > MAX_EXTENDED:
            raise Damage(
                f"{path}: after {last}: an extended header of {length} bytes, more than the {MAX_EXTENDED} allowed"
            )
        content = file.pread(length, place + BLOCK)
        if kind == LONG_NAME:
            name = _text(content.rstrip(b"\0"), path, last)
        else:
            records = _records(content, path, last)
            name = records.get("path", name)
            if "size" in records:
                size = (
                    int(records["size"]) if records["size"].isascii() and records["size"].isdigit() else 2**63
                )
            if any(key.startswith("GNU.sparse") for key in records):
                raise Damage(f"{path}: after {last}: a sparse file; expected a plain one")
        place += BLOCK + -(-length // BLOCK) * BLOCK
        header = file.pread(BLOCK, place)


def _checked_size(header: bytes, path: Path, last: str) -> int:
    """The size that a header gives. Raises Damage unless its checksum is right."""
    try:
        if len(header) == BLOCK:
            told = int(header[148:156].strip(b" \0"), 8)
            # The sum of all bytes, those of the checksum itself counted as spaces.
            size = int(header[124:136].strip(b" \0") or b"0", 8)
            if told == sum(header) - sum(header[148:156]) + 8 * 32 and size >= 0:
                return size
    except ValueError:
        pass
    raise Damage(f"{path}: damaged or cut after {last} (no header of a member there); make the shard again")


def _records(content: bytes, path: Path, last: str) -> dict[str, str]:
    """An extended header: lines "LENGTH KEY=VALUE", each as long as it says."""
    found = {}
    while content:
        digits = content.partition(b" ")[0]
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        key, equals, value = content[len(digits) + 1 : length - 1].partition(b"=")
        if not equals or content[length - 1 : length] != b"\n":
            raise Damage(f"{path}: after {last}: a damaged extended header")
        found[_text(key, path, last)] = _text(value, path, last)
        content = content[length:]
    return found


def _text(content: bytes, path: Path, last: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise Damage(f"{path}: after {last}: a name that is not UTF-8") from None


def _check_end(file: opened, path: Path, place: int, size: int, last: str) -> None:
    """A whole tar ends in two blocks of zeros or more; anything else means that samples are missing."""
    rest = file.pread(2**20, place)
    if len(rest) < 2 * BLOCK or any(rest) or place + len(rest) < size:
        raise Damage(f"{path}: damaged or cut after {last} (no end of archive there); make the shard again")


def content(file: opened, member: Member, path: Path) -> bytes:
    found = file.pread(member.size, member.offset)
    if len(found) < member.size:
        raise Damage(
            f"{path}: member {member.name}: {len(found)} of {member.size} bytes; the file has become shorter"
        )
    return found
