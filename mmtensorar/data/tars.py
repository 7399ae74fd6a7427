"""Read tars by their headers, so that a sample can be read without the samples before it.

Tars are not trusted: names, kinds and sizes of members are checked before a byte
of content is read, and nothing is extracted. We do not use tarfile, because it cannot start
in the middle of an archive and takes a broken header for the end of the archive.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

BLOCK = 512  # bytes; the unit of headers and padding in a tar
PLAIN, FOLDER, EXTENDED, GLOBAL, LONG_NAME = (b"0", b"\0"), b"5", b"x", b"g", b"L"
MAX_EXTENDED = 2**16  # bytes of an extended header


class Member(NamedTuple):
    """One member of a tar.

    name: as the headers give it. start: offset of its first header in bytes.
    offset, size: of its content in bytes. end: offset of the next header.
    """

    name: str
    start: int
    offset: int
    size: int
    end: int


class Group(NamedTuple):
    """Consecutive members with one key.

    start, end: offsets of its first header and of the header after it.
    duplicate: name of a member whose extension came twice, None when there is none.
    is_complete: False when damage ended the group, so that members may be missing.
    """

    key: str
    start: int
    end: int
    members: dict[str, Member]
    duplicate: str | None
    is_complete: bool

    def check_unique(self, path: Path) -> None:
        """Raise ValueError when an extension came twice."""
        if self.duplicate is not None:
            raise ValueError(f"{path}: sample {self.key}: member {self.duplicate} occurs twice")


class Damage(ValueError):
    """A tar cannot be read beyond some offset."""


class TarReader:
    """An open tar, for use in a with statement.

    path: a file on disk or a UPath. Raises Damage when the file is missing.
    """

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> TarReader:
        self.file: int | None = None
        self.stream: Any = None
        try:
            if isinstance(self.path, (str, Path)):
                self.file = os.open(self.path, os.O_RDONLY)
            else:
                self.stream = self.path.open("rb")
        except FileNotFoundError:
            raise Damage(f"{self.path}: the shard is missing") from None
        return self

    def __exit__(self, *exception: object) -> None:
        if self.file is not None:
            os.close(self.file)
        else:
            self.stream.close()

    def size(self) -> int:
        """Bytes of the whole file."""
        return os.fstat(self.file).st_size if self.file is not None else self.stream.seek(0, os.SEEK_END)

    def pread(self, num_bytes: int, offset: int) -> bytes:
        """Up to num_bytes bytes from an offset."""
        if self.file is not None:
            return os.pread(self.file, num_bytes, offset)
        self.stream.seek(offset)
        return self.stream.read(num_bytes)


def iterate_members(
    file: TarReader, path: Path, start: int = 0, stop: int | None = None, *, folders: bool = False
) -> Iterator[Member]:
    """Members from the header at `start` to that at `stop`, or to the end of the archive.

    Content is not read.

    Args:
        folders: Accept folders; they come as empty members whose names end in a slash.

    Raises Damage, naming the path and the previous member, for a broken header, a truncated
    member, a member that is not a plain file, and an archive without its end marker.
    """
    size = file.size()
    offset, last = start, "the start" if start == 0 else f"byte {start}"
    while stop is None or offset < stop:
        header = file.pread(BLOCK, offset)
        if header == bytes(BLOCK):
            _check_end(file, path, offset, size, last)
            return
        member = _read_member(file, header, offset, path, last, (*PLAIN, FOLDER) if folders else PLAIN)
        if member.offset + member.size > size:
            raise Damage(
                f"{path}: damaged or cut after {last} ({member.name} reaches beyond the end); "
                "make the shard again"
            )
        offset, last = member.end, member.name
        yield member


def group_members(
    file: TarReader,
    path: Path,
    split_name: Callable[[Member], tuple[str, str] | None],
    *,
    folders: bool = False,
) -> Iterator[Group]:
    """Group consecutive members of a whole tar by their keys.

    Args:
        split_name: Member -> (key, extension), or None to pass over the member. It may
            raise ValueError.
        folders: See iterate_members.

    Raises ValueError (Damage like iterate_members) for a key that comes back after another
    key. An incomplete group in front of the damage is yielded first.
    """
    seen: set[str] = set()
    key: str | None = None
    start = end = 0
    members: dict[str, Member] = {}
    duplicate: str | None = None
    try:
        for member in iterate_members(file, path, folders=folders):
            name = split_name(member)
            if name is None:
                continue
            if name[0] != key:
                if key is not None:
                    yield Group(key, start, end, members, duplicate, True)
                    key_before, key = key, None
                    seen.add(key_before)
                if name[0] in seen:
                    raise ValueError(
                        f"{path}: sample {name[0]}: its members are not together: "
                        f"{member.name} comes after another key"
                    )
                key, start, members, duplicate = name[0], member.start, {}, None
            if name[1] in members:
                duplicate = duplicate or member.name
            members[name[1]] = member
            end = member.end
    except (ValueError, OSError):
        if key is not None:
            yield Group(key, start, end, members, duplicate, False)
        raise
    if key is not None:
        yield Group(key, start, end, members, duplicate, True)


def read_content(file: TarReader, member: Member, path: Path) -> bytes:
    """A member's content. Raises Damage when the file has become shorter since it was opened."""
    content = file.pread(member.size, member.offset)
    if len(content) < member.size:
        raise Damage(
            f"{path}: member {member.name}: {len(content)} of {member.size} bytes; "
            "the file has become shorter"
        )
    return content


# ---- headers ---------------------------------------------------------------------------------


def _read_member(
    file: TarReader, header: bytes, start: int, path: Path, last: str, kinds: tuple[bytes, ...]
) -> Member:
    """The member whose only header, or first of several headers, is given.

    Args:
        start: Offset of that header.
        last: Name of the member before it, for messages.
        kinds: Kinds of members that are accepted.
    """
    name = None
    size = None
    offset = start
    while True:
        kind = header[156:157]
        length = _checked_size(header, path, last)
        if kind in kinds:
            if name is None:
                name = _name_in(header, path, last)
            length = length if size is None else size
            content = offset + BLOCK
            return Member(name, start, content, length, content + -(-length // BLOCK) * BLOCK)
        if kind not in (EXTENDED, GLOBAL, LONG_NAME):
            name = _text(header[:100].partition(b"\0")[0], path, last).rstrip("/")
            raise Damage(
                f"{path}: sample {name.partition('.')[0]}: member {name} is a link, folder or device; "
                "expected a plain file"
            )
        if length > MAX_EXTENDED:
            raise Damage(
                f"{path}: after {last}: an extended header of {length} bytes, "
                f"more than the {MAX_EXTENDED} allowed"
            )
        body = file.pread(length, offset + BLOCK)
        if kind == LONG_NAME:
            name = _text(body.rstrip(b"\0"), path, last)
        else:
            name, size = _apply_records(_records(body, path, last), name, size, path, last)
        offset += BLOCK + -(-length // BLOCK) * BLOCK
        header = file.pread(BLOCK, offset)


def _name_in(header: bytes, path: Path, last: str) -> str:
    """The member's name that a plain header gives, with ustar's prefix."""
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    name = _text(header[:100].partition(b"\0")[0], path, last)
    return f"{_text(prefix, path, last)}/{name}" if prefix else name


def _apply_records(
    records: dict[str, str], name: str | None, size: int | None, path: Path, last: str
) -> tuple[str | None, int | None]:
    """Name and size after an extended header, which may replace either. Refuses sparse files."""
    name = records.get("path", name)
    if "size" in records:
        text = records["size"]
        size = int(text) if text.isascii() and text.isdigit() else 2**63
    if any(key.startswith("GNU.sparse") for key in records):
        raise Damage(f"{path}: after {last}: a sparse file; expected a plain one")
    return name, size


def _checked_size(header: bytes, path: Path, last: str) -> int:
    """The size that a header gives. Raises Damage unless its checksum is right."""
    try:
        if len(header) == BLOCK:
            checksum = int(header[148:156].strip(b" \0"), 8)
            size = int(header[124:136].strip(b" \0") or b"0", 8)
            # The checksum is the sum of all bytes, with its own eight counted as spaces.
            if checksum == sum(header) - sum(header[148:156]) + 8 * 32 and size >= 0:
                return size
    except ValueError:
        pass
    raise Damage(f"{path}: damaged or cut after {last} (expected a member's header); make the shard again")


def _records(content: bytes, path: Path, last: str) -> dict[str, str]:
    """Parse an extended header: lines "LENGTH KEY=VALUE", where LENGTH counts the whole line."""
    records = {}
    while content:
        digits = content.partition(b" ")[0]
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        key, equals, value = content[len(digits) + 1 : length - 1].partition(b"=")
        if not equals or content[length - 1 : length] != b"\n":
            raise Damage(f"{path}: after {last}: a damaged extended header")
        records[_text(key, path, last)] = _text(value, path, last)
        content = content[length:]
    return records


def _text(content: bytes, path: Path, last: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise Damage(f"{path}: after {last}: a name that is not UTF-8") from None


def _check_end(file: TarReader, path: Path, offset: int, size: int, last: str) -> None:
    """A complete tar ends in two or more blocks of zeros; anything else means lost samples."""
    rest = file.pread(2**20, offset)
    if len(rest) < 2 * BLOCK or any(rest) or offset + len(rest) < size:
        raise Damage(
            f"{path}: damaged or cut after {last} (expected the end of the archive); make the shard again"
        )
