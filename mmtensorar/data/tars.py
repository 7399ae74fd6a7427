"""Read tars by their headers, so that a sample can be read without the samples before
it.

Tars are not trusted: names, kinds and sizes of members are checked before a byte of
content is read, and nothing is extracted. We do not use tarfile, because it cannot
start in the middle of an archive and takes a broken header for the end of the archive.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

BLOCK = 512  # bytes; the unit of headers and padding in a tar
PLAIN = (b"0", b"\0", b"7")  # a file; of an old tar; one that should lie in one piece on a disk
FOLDER, DUMPED_FOLDER = b"5", b"D"  # the second has a list of its files as content (tar --incremental)
LINKS = (b"1", b"2")
EXTENDED, GLOBAL = (b"x", b"X"), b"g"  # records about the next member (X: Solaris), about all members
LONG_NAME, LONG_LINK, LABEL = b"L", b"K", b"V"  # GNU tar's
MAX_EXTENDED = 2**24  # bytes of an extended header; macOS puts whole resource forks into one
MAX_RECORDS = 10_000  # of an extended header
MAX_NAME = 2**16  # bytes
# The first bytes of compressed files, and what unpacks them.
COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"LZIP": "lzip",
    b"\x1f\x9d": "compress",
    # Frames to skip, of any of these kinds, with which pzstd begins a file.
    **{bytes((0x50 + kind, 0x2A, 0x4D, 0x18)): "zstd" for kind in range(16)},
}


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


def compression(head: bytes) -> str | None:
    """The program that compressed a file, by the file's first bytes; None for a plain
    tar.
    """
    return next((name for magic, name in COMPRESSIONS.items() if head.startswith(magic)), None)


class TarReader:
    """An open tar, for use in a with statement.

    Args:
        path: A file on disk or a UPath.
        content: An open file with the plain tar, when `path` is compressed. It stays
            open.

    Raises Damage when the file is missing.
    """

    def __init__(self, path: Path, content: BinaryIO | None = None):
        self.path, self.content = path, content

    def __enter__(self) -> TarReader:
        self.file: int | None = None
        self.stream: Any = None
        try:
            if self.content is not None:
                self.file = os.dup(self.content.fileno())
            elif isinstance(self.path, (str, Path)):
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
    """Members from the header at `start` to that at `stop`, or to the end of the
    archive.

    Content is not read.

    Args:
        folders: Accept folders; they come as empty members whose names end in a slash.

    Raises Damage, naming the path and the previous member, for a broken header, a
    truncated member, a member that is not a plain file, an archive without its end
    marker, one that is compressed, and content behind the end marker.
    """
    size = file.size()
    offset, last = start, "the start" if start == 0 else f"byte {start}"
    while stop is None or offset < stop:
        header = file.pread(BLOCK, offset)
        if header == bytes(BLOCK):
            _check_end(file, path, offset, size, last)
            return
        if offset == 0:
            _check_plain(header, path)
        if header[156:157] in (GLOBAL, LABEL):
            offset = _pass_over(file, header, offset, path, last)
            continue
        member = _read_member(file, header, offset, path, last, folders)
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

    Raises ValueError (Damage like iterate_members) for a key that comes back after
    another key. An incomplete group in front of the damage is yielded first.
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
                        f"{member.name} comes after another key; tar --sort=name puts them together"
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
    """A member's content.

    Raises Damage when the file has become shorter since it was opened.
    """
    content = file.pread(member.size, member.offset)
    if len(content) < member.size:
        raise Damage(
            f"{path}: member {member.name}: {len(content)} of {member.size} bytes; "
            "the file has become shorter"
        )
    return content


# ---- headers ---------------------------------------------------------------------------------


def _check_plain(header: bytes, path: Path) -> None:
    """Raise Damage, with the cure, when a tar is compressed."""
    if name := compression(header):
        raise Damage(
            f"{path}: compressed with {name}, or damaged; samples are read in any order, which needs a "
            f"plain tar: unpack it, or make a set of it with mmtensorar shards make --tars {path} --out NEW"
        )


def _pass_over(file: TarReader, header: bytes, offset: int, path: Path, last: str) -> int:
    """Where the header after a volume's label, or after records about all members,
    begins.

    git archive writes its commit into such a record. Raises Damage for a record that
    would change what is read: a member is also read without the headers at the start of
    the tar.
    """
    size = _checked_size(header, path, last)
    if header[156:157] == LABEL:
        return offset + BLOCK
    records = _records(_extension(file, size, offset, path, last, MAX_EXTENDED), path, last)
    if changing := [key for key in records if key != "hdrcharset"]:
        raise Damage(
            f"{path}: after {last}: a record about all members gives their {changing[0]}; "
            "expected it in the header of each member"
        )
    return offset + BLOCK + _padded(size)


def _read_member(file: TarReader, header: bytes, start: int, path: Path, last: str, folders: bool) -> Member:
    """The member whose only header, or first of several headers, is given.

    Args:
        start: Offset of that header.
        last: Name of the member before it, for messages.
        folders: Whether folders are accepted.
    """
    name: bytes | None = None
    size: int | None = None
    offset = start
    while (kind := header[156:157]) in (*EXTENDED, LONG_NAME, LONG_LINK):
        length = _checked_size(header, path, last)
        body = _extension(file, length, offset, path, last, MAX_EXTENDED if kind in EXTENDED else MAX_NAME)
        if kind in EXTENDED:
            records = _records(body, path, last)
            if any(key.startswith("GNU.sparse") for key in records):
                raise Damage(f"{path}: after {last}: a sparse file; expected a plain one")
            # An empty value takes a record back.
            name = records.get("path", name) or None
            size = _size_in(records["size"], path, last) if records.get("size") else size
        elif kind == LONG_NAME:
            name = body.partition(b"\0")[0]
        offset += BLOCK + _padded(length)
        header = file.pread(BLOCK, offset)
    length = _checked_size(header, path, last)
    text = _text(_name_in(header) if name is None else name, path, last)
    content = offset + BLOCK
    if kind == FOLDER or (kind == DUMPED_FOLDER and folders) or (kind == b"\0" and text.endswith("/")):
        # The size of a folder is what it may grow to; nothing follows its header. A
        # name that ends in a slash is a folder in old tars.
        if not folders:
            raise _not_plain(path, text)
        end = content + (_padded(length) if kind == DUMPED_FOLDER else 0)
        return Member(text.rstrip("/") + "/", start, content, 0, end)
    if kind == b"S":
        raise Damage(f"{path}: after {last}: {text} is a sparse file; expected a plain one")
    if kind not in PLAIN:
        raise _not_plain(path, text)
    length = length if size is None else size
    return Member(text, start, content, length, content + _padded(length))


def _not_plain(path: Path, name: str) -> Damage:
    name = name.rstrip("/")
    return Damage(
        f"{path}: sample {name.partition('.')[0]}: member {name} is a link, folder or device; "
        "expected a plain file"
    )


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // BLOCK) * BLOCK


def _name_in(header: bytes) -> bytes:
    """The member's name that a plain header gives, with ustar's prefix."""
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    name = header[:100].partition(b"\0")[0]
    return prefix + b"/" + name if prefix else name


def _extension(file: TarReader, length: int, offset: int, path: Path, last: str, most: int) -> bytes:
    """The content of an extended header at an offset.

    Raises Damage when it has more than `most` bytes.
    """
    if length > most:
        raise Damage(
            f"{path}: after {last}: an extended header of {length} bytes, more than the {most} allowed"
        )
    body = file.pread(length, offset + BLOCK)
    if len(body) < length:
        raise Damage(f"{path}: damaged or cut after {last} (in an extended header); make the shard again")
    return body


def _checked_size(header: bytes, path: Path, last: str) -> int:
    """The size that a header gives. Raises Damage unless its checksum is right."""
    checksum, size = _octal(header[148:156]), _number(header[124:136])
    if len(header) == BLOCK and size is not None:
        # The checksum is the sum of all bytes, with its own eight counted as spaces.
        # Some old programs added bytes above 127 as negative numbers.
        total = sum(header) - sum(header[148:156]) + 8 * 32
        high = sum(byte > 127 for byte in header[:148] + header[156:])
        if checksum in (total, total - 256 * high):
            return size
    raise Damage(f"{path}: damaged or cut after {last} (expected a member's header); make the shard again")


def _number(field: bytes) -> int | None:
    """A number of a header: octal digits, or GNU's binary form.

    None for anything else.
    """
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    return _octal(field)


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0").partition(b"\0")[0].rstrip(b" ")
    # int() also accepts signs, underscores and 0o.
    return int(digits or b"0", 8) if all(byte in b"01234567" for byte in digits) else None


def _size_in(record: bytes, path: Path, last: str) -> int:
    if not record.isdigit() or len(record) > 18:
        raise Damage(f"{path}: after {last}: an extended header gives the size {record[:20]!r}")
    return int(record)


def _records(content: bytes, path: Path, last: str) -> dict[str, bytes]:
    """The records of an extended header that change what is read: name, size, and
    sparse files.

    A record is "LENGTH KEY=VALUE\\n", where LENGTH counts all of it. Other records may
    hold any bytes, such as extended attributes, and are passed over.
    """
    records: dict[str, bytes] = {}
    begin = num_records = 0
    while begin < len(content):
        num_records += 1
        space = content.find(b" ", begin, begin + 9)
        digits = content[begin:space] if space > 0 else b""
        end = begin + int(digits) if digits.isdigit() else 0
        equals = content.find(b"=", space, end)
        if equals < 0 or content[end - 1 : end] != b"\n" or num_records > MAX_RECORDS:
            if not content[begin:].strip(b"\0"):
                break  # some programs count the padding
            raise Damage(f"{path}: after {last}: a damaged extended header")
        key = content[space + 1 : equals]
        if key in (b"path", b"size", b"hdrcharset") or key.startswith(b"GNU.sparse"):
            records[key.decode(errors="replace")] = content[equals + 1 : end - 1]
        begin = end
    return records


def _text(content: bytes, path: Path, last: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise Damage(f"{path}: after {last}: a name that is not UTF-8") from None


def _check_end(file: TarReader, path: Path, offset: int, size: int, last: str) -> None:
    """A complete tar ends in two or more blocks of zeros; anything else means lost
    samples.

    Their number depends on the size of a record, which `tar -b` sets: up to 16 MiB and
    more.
    """
    if size - offset < 2 * BLOCK:
        raise Damage(
            f"{path}: damaged or cut after {last} (expected the end of the archive); make the shard again"
        )
    while rest := file.pread(2**20, offset):
        if content := rest.lstrip(b"\0"):
            at = offset + len(rest) - len(content)
            raise Damage(
                f"{path}: content at byte {at}, behind the end of the archive after {last}: damaged, or "
                "several tars in one file; expected one tar, which ends in zeros"
            )
        offset += len(rest)
