"""Files: atomic writes, SHA-256, JSON, and errors that name the file. Imports nothing of ours.

Paths are `pathlib.Path`; `write_text` and `move` also take a UPath of an object store.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_LINE = 2**24  # characters; a small compressed file may expand to an endless line


def sha256(path: Path, progress: Callable[[int], Any] = lambda num_bytes: None) -> str:
    """Hex digest of a file's content. progress is called with the bytes of each block read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def fingerprint(path: Path) -> str:
    """SHA-256 over name, size, and first and last MiB of a file, or of all files in a folder.

    Fast at any size, and enough to distinguish trained weights. A path that does not exist (a hub id) is
    hashed itself.
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
    """A temporary file to write, which replaces `path` when the block ends without an error.

    The temporary name is unique, so that two writers of one path (a task and its retry) never mix.
    The content is flushed to disk before the rename, so that a power cut leaves no empty file.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_path(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary file or folder, renamed to `path` when the block ends and removed when it fails.

    replace: whether it replaces an existing `path`. Otherwise raises ValueError when `path` exists.
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
    # Renaming onto a folder that holds files fails, so the old one is renamed first, and
    # deleted only when the new one is in place.
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


# ---- JSON ----------------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises ValueError, naming the file, when it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected one JSON object")
    check_characters(value, str(path))
    return value


def read_json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """("FILE line N", object) of each line of a .jsonl or .jsonl.gz file.

    Raises ValueError for a damaged line, naming file and line, and for an empty file.
    """
    number = 0
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            while line := file.readline(MAX_LINE):
                number += 1
                if len(line) == MAX_LINE:
                    raise ValueError(f"{path} line {number}: longer than {MAX_LINE} characters")
                try:
                    value = json.loads(line)
                except (json.JSONDecodeError, RecursionError):
                    value = None
                if not isinstance(value, dict):
                    raise ValueError(f"{path} line {number}: expected one JSON object")
                check_characters(value, f"{path} line {number}")
                yield f"{path} line {number}", value
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{path} after line {number}: damaged ({error})") from None
    if not number:
        raise ValueError(f"{path} is empty")


def write_json_lines(path: Path, rows: Iterable[dict]) -> None:
    """Write one JSON object a line, atomically: nothing is written when `rows` raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def check_characters(value: Any, where: str) -> None:
    """Raise ValueError, starting with `where`, for half a character or a zero one in a value of JSON.

    JSON may write them as escapes (\\ud800, \\u0000), but they are no text, and no name of a file.
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
