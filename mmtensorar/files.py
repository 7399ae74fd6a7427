"""Files: atomic writes, SHA-256, text, JSON, and errors that name the file.

Imports nothing of ours.

Paths are `pathlib.Path`; `write_text` and `move` also take a UPath of an object store.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import sys
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

MAX_LINE = 2**24  # bytes; a small compressed file may expand to an endless line
MARK = "\ufeff"  # the byte-order mark, which some editors put in front


def sha256(path: Path, progress: Callable[[int], Any] = lambda num_bytes: None) -> str:
    """Hex digest of a file's content. progress is called with the bytes of each block
    read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def fingerprint(path: Path) -> str:
    """SHA-256 over name, size, and first and last MiB of a file, or of all files in a
    folder.

    Fast at any size, and enough to distinguish trained weights. A path that does not
    exist (a hub id) is hashed itself.
    """
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256(b"" if files else str(path).encode())
    for name in files:
        size = name.stat().st_size
        digest.update(f"{name.relative_to(path)} {size}\n".encode())
        with name.open("rb") as file:
            digest.update(file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()


# ---- writing -------------------------------------------------------------------------------------


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary file to write, which replaces `path` when the block ends without an
    error.

    The temporary name is unique, so that two writers of one path (a task and its retry)
    never mix. The content is flushed to disk before the rename, so that a power cut
    leaves no empty file.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file of the same folder its name; never replaces a file.

    The name is taken in one step: a process that is killed leaves no empty or
    incomplete file under it. The temporary name remains, except on a file system
    without hard links. Raises FileExistsError when the name is taken.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: a second file reserves the name
        reserved = path.with_name(f".{path.name}.taken")
        os.close(os.open(reserved, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            if os.path.lexists(path):
                raise FileExistsError(f"{path} exists already") from None
            os.rename(temporary, path)
        finally:
            reserved.unlink(missing_ok=True)


@contextmanager
def temporary_name(folder: Path) -> Iterator[Path]:
    """A hidden name in a folder for a file that is not finished; a file of it is
    removed at the end.
    """
    temporary = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_path(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary file or folder, renamed to `path` when the block ends and removed
    when it fails.

    replace: whether it replaces an existing `path`. Otherwise raises ValueError when
    `path` exists.
    """
    if os.path.lexists(path) and not replace:
        raise ValueError(f"{path} exists already; give another name, or remove it")
    partial = path.with_name(path.name + ".partial")
    remove(partial)  # left by a process that was killed
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        if replace and path.is_dir():
            _replace_folder(partial, path)
        else:
            os.rename(partial, path)
    except BaseException:
        remove(partial)
        raise


def _replace_folder(source: Path, target: Path) -> None:
    # Renaming onto a folder that holds files fails, so the old one is renamed first,
    # and deleted only when the new one is in place.
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(target, old)
    os.replace(source, target)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Object stores (UPath) always write that way."""
    if not isinstance(path, Path):
        path.write_text(text, encoding="utf-8")
        return
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def move(source: Path, target: Path) -> None:
    """Rename a file; a UPath is copied inside its store."""
    if isinstance(source, Path):
        os.replace(source, target)
    else:
        source.fs.mv(source.path, target.path)


def remove(path: Path) -> None:
    """Delete a file or a whole folder, if it exists; a UPath too."""
    if not isinstance(path, Path):
        if path.exists():
            path.fs.rm(path.path, recursive=True)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- text ----------------------------------------------------------------------------------------
# Every text file is read here: UTF-8 without its byte-order mark, in lines that end at
# LF or CRLF. Python's splitlines also ends lines at a form feed, at U+0085 and at
# U+2028.


class NotText(ValueError):
    """Bytes that are not text in UTF-8.

    The message can follow "FILE:" or "the caption is".

    kind: what they are. line, byte: where, from 1, the byte within the line; 0:
    everywhere.
    """

    def __init__(self, kind: str, line: int = 0, byte: int = 0):
        super().__init__(f"{kind} (line {line}, byte {byte})" if line else kind)
        self.kind, self.line, self.byte = kind, line, byte


def decode(content: bytes) -> str:
    """Bytes of UTF-8 -> text, without byte-order marks in front.

    Raises NotText for another encoding, and for a NUL.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise NotText("not UTF-8 but UTF-16; save it as UTF-8")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        kind = f"not UTF-8: 0x{content[error.start]:02x}"
        raise NotText(kind, *_place(content, error.start)) from None
    if "\0" in text:
        raise NotText("not text in UTF-8: NUL, as in UTF-16", *_place(content, content.index(0)))
    return text.lstrip(MARK)


def _place(content: bytes, position: int) -> tuple[int, int]:
    line_start = content.rfind(b"\n", 0, position) + 1
    return content.count(b"\n", 0, position) + 1, position - line_start + 1


def decode_text(content: bytes, where: str) -> str:
    """The text of a file's bytes.

    Raises ValueError, starting with `where`, when it is not UTF-8.
    """
    try:
        return decode(content)
    except NotText as error:
        raise ValueError(f"{where}: {error}") from None


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without its byte-order mark; line ends stay as they
    are.

    Raises ValueError naming file, line and byte when it is not UTF-8, and OSError when
    it cannot be read.
    """
    with path.open("rb") as file:
        return decode_text(file.read(), str(path))


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, without their ends.

    Raises like `read_text`, and like `split_lines`.
    """
    return split_lines(read_text(path), str(path))


def split_lines(text: str, where: str) -> list[str]:
    """Lines, which end at LF or CRLF only, without byte-order marks in front.

    Files that were joined have one in the middle.

    Raises ValueError, starting with `where`, when all lines end in CR: as one line,
    they would be one prompt or one row.
    """
    lines = text.split("\n")
    if not lines[-1]:
        del lines[-1]
    if len(lines) == 1 and _has_inner_cr(lines[0]):
        raise ValueError(f"{where}: {_CR_ALONE}")
    return [line.removesuffix("\r").lstrip(MARK) for line in lines]


_CR_ALONE = "its lines end in CR alone; expected LF or CRLF"


def _has_inner_cr(line: str) -> bool:
    return "\r" in line.strip("\r")


class Line(NamedTuple):
    """One line of a text file.

    number: from 1. text: without the line's end. problem: why it cannot be read, None
    when it can. end: LF, CRLF, or nothing after the last line.
    """

    number: int
    text: str
    problem: str | None = None
    end: str = ""


def iterate_lines(file: IO[bytes] | io.BufferedIOBase, max_bytes: int = MAX_LINE) -> Iterator[Line]:
    """The lines of an open file, one after the other.

    A line of max_bytes or more is a problem.
    """
    number = 0
    while content := file.readline(max_bytes):
        number += 1
        if len(content) == max_bytes and not content.endswith(b"\n"):
            while (rest := file.readline(max_bytes)) and not rest.endswith(b"\n"):
                pass
            yield Line(number, "", f"the line has {max_bytes} bytes or more")
            continue
        end = "" if not content.endswith(b"\n") else "\r\n" if content.endswith(b"\r\n") else "\n"
        try:
            text = decode(content[: len(content) - len(end)])
        except NotText as error:
            where = f" (byte {error.byte})" if error.byte else ""
            yield Line(number, "", error.kind + where)
            continue
        all_in_cr = number == 1 and not content.endswith(b"\n") and _has_inner_cr(text)
        yield Line(number, text, _CR_ALONE if all_in_cr else None, end)


# ---- JSON ----------------------------------------------------------------------------------------


class _Repeated(ValueError):
    """A key occurs twice in an object."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        repeated = ", ".join(repr(key) for key, count in counts.items() if count > 1)
        raise _Repeated(f"a key occurs twice: {repeated}")
    return value


def parse_json(text: str) -> Any:
    """A JSON value.

    Raises ValueError, in our words, for anything else, and for a key that occurs twice in
    an object, of which Python would take the last.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except _Repeated:
        raise
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except RecursionError:
        raise ValueError("not JSON: it is nested too deeply") from None
    except ValueError:  # Python's advice is a call to a function of its own
        raise ValueError("not JSON that we read: a number has thousands of digits") from None


def read_json(path: Path) -> dict:
    """The JSON object in a file.

    Raises ValueError, naming the file, when it is missing or damaged.
    """
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: expected one JSON object; {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected one JSON object, got {type(value).__name__}")
    check_characters(value, str(path))
    return value


def read_json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """("FILE line N", object) of each line of a .jsonl or .jsonl.gz file.

    Raises ValueError for a damaged line, naming file and line, and for an empty file.
    """
    number = 0
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            for number, text, problem, _ in iterate_lines(file):
                if problem is not None:
                    raise ValueError(f"{path} line {number}: {problem}")
                try:
                    value = parse_json(text)
                except ValueError as error:
                    raise ValueError(f"{path} line {number}: expected one JSON object; {error}") from None
                if not isinstance(value, dict):
                    raise ValueError(f"{path} line {number}: expected one JSON object")
                check_characters(value, f"{path} line {number}")
                yield f"{path} line {number}", value
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} after line {number}: damaged ({error})") from None
    if not number:
        raise ValueError(f"{path} is empty")


def end_last_line(file: BinaryIO, path: Path, key: str) -> None:
    """Make a file of JSON lines, open for reading and appending, ready for the next
    line.

    A last line that is incomplete, from a process that was killed while it wrote, is
    removed, and that is printed. A whole one without a line end gets one.

    key: the first one of every line. Raises ValueError, and changes nothing, when the
    first or the last line lacks it: somebody else's file has the same name.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - MAX_LINE))
    tail = file.read()
    line = tail[tail.rfind(b"\n") + 1 :]
    file.seek(0)
    for place, text in (("first", file.readline(MAX_LINE)), ("last", line)):
        if text and not _begins_with(text, key, str(path)):
            raise ValueError(
                f"{path}: its {place} line is not a JSON object with {key!r}, so the file is not ours and "
                "stays as it is; choose another name"
            )
    if not line:
        return
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        file.truncate(size - len(line))
        print(f"note: {path}: the last line is incomplete (a run was killed); it is removed", file=sys.stderr)
    else:
        file.seek(0, os.SEEK_END)
        file.write(b"\n")
        file.flush()


def _begins_with(line: bytes, key: str, where: str) -> bool:
    """Whether a line of JSON, or the part of it that was written, is an object with
    this key.

    Raises ValueError, starting with `where`, when it is not UTF-8.
    """
    begin = f'{{"{key}": '.encode()
    if line.startswith(begin) or begin.startswith(line):
        return True
    text = decode_text(line, where)
    try:
        value = parse_json(text)
    except ValueError:
        return False
    return isinstance(value, dict) and key in value


def write_json_lines(path: Path, rows: Iterable[dict]) -> None:
    """Write one JSON object a line, atomically: nothing is written when `rows`
    raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def check_characters(value: Any, where: str) -> None:
    """Raise ValueError, starting with `where`, for half a character or a zero one in a
    value of JSON.

    JSON may write them as escapes (\\ud800, \\u0000), but they are no text, and no name
    of a file.
    """
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            waiting += [*part, *part.values()]
        elif isinstance(part, list):
            waiting += part
        elif isinstance(part, str) and re.search("[\\0\ud800-\udfff]", part):
            what = "a zero character" if "\0" in part else "half a character (a lone surrogate)"
            raise ValueError(f"{where}: {ascii(part[:80])} holds {what}")
