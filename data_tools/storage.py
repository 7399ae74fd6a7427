"""Folders that shards are made from and written to: on disk, or in an object store, by URL.

Paths are pathlib.Path, or UPath (universal-pathlib) for a URL, which reads and writes through
fsspec. A file appears under its name only when it is complete, in both.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from mmtensorar.data.shards import EXTENSIONS, MANIFEST, Manifest
from mmtensorar.data.url_cache import is_url, shown


def at(name: str) -> Path | Any:
    """The path that a name or URL means.

    Raises ValueError for a URL of an unknown scheme, a shell command, or a missing library.
    """
    if not is_url(name):
        return Path(name)
    try:
        from upath import UPath

        # Listings are not cached: workers write to the same folder.
        return UPath(name, use_listings_cache=False)
    except ImportError as error:
        raise ValueError(
            f"{shown(name)} needs a library: pip install 'mmtensorar[remote]' ({error})"
        ) from None


def argument(name: str) -> Path | Any:
    """A path on the command line (an argparse type)."""
    try:
        return at(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def folder_to_write(name: str) -> Path | Any:
    """A folder on the command line that is written to (an argparse type)."""
    if name.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(
            f"{shown(name)}: cannot write shards to a web server; expected a folder, s3://, gs:// or hf://"
        )
    return argument(name)


def is_local(path: Path | Any) -> bool:
    """Whether a path is on disk, not in a store."""
    return isinstance(path, Path)


# ---- listing ---------------------------------------------------------------------------------


def files(root: Path | Any) -> dict[Path | Any, int | None]:
    """Every file below a folder and its bytes, if known, sorted by the parts of its path.

    Hidden files and the content of hidden folders are left out. Raises ValueError when the
    folder cannot be listed, for a name that is not UTF-8, and for a link that leads out of
    the folder, which an unpacked archive may have brought.
    """
    sizes = _local_files(root) if is_local(root) else _store_files(root)
    return dict(sorted(sizes.items(), key=lambda pair: pair[0].parts))


def _local_files(root: Path) -> dict[Path, int | None]:
    sizes, resolved_root = {}, root.resolve()
    for path in root.rglob("*"):
        if not path.is_file() or _is_hidden(path, root):
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(resolved_root):
            raise ValueError(f"{path}: a link that leads out of {root}; put the file itself there")
        if not is_utf8(str(path)):
            raise ValueError(f"{str(path)!r}: a name that is not UTF-8; rename the file or folder")
        sizes[path] = path.stat().st_size
    return sizes


def _store_files(root: Any) -> dict[Any, int | None]:
    try:
        listed = root.fs.find(root.path, detail=True)
    except OSError as error:
        raise ValueError(f"{shown(str(root))}: cannot be listed ({error})") from error
    # A relative name, unlike a path, is the same for a store and for UPath.
    sizes = {
        root / name.removeprefix(root.path).lstrip("/"): status.get("size") for name, status in listed.items()
    }
    return {path: size for path, size in sizes.items() if not _is_hidden(path, root)}


def _is_hidden(path: Path | Any, root: Path | Any) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def is_utf8(name: str) -> bool:
    """Whether a file name is valid UTF-8. Python marks undecodable bytes with surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def with_suffix(name: str, suffix: str) -> tuple[Path | Any, list[Path | Any]]:
    """The path that a name means, and its files with a suffix, sorted.

    The files are the path itself if it is a file, else all below it. Raises ValueError when
    there are none.
    """
    path = at(name)
    if path.is_file():
        return path, [path]
    if is_local(path) and not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    if suffix == ".tar" and (path / MANIFEST).is_file():
        # Only the shards of the manifest: other tars belong to unfinished work.
        return path, [path / shard.name for shard in Manifest.read(path, complete=False).shards]
    paths = [file for file in files(path) if file.suffix == suffix]
    if not paths:
        raise ValueError(f"{shown(name)}: no {suffix} files in it")
    return path, paths


def folders(root: Path | Any) -> tuple[str, ...]:
    """Names of the folders in a folder, sorted. Hidden ones are left out."""
    return tuple(
        sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    )


# ---- reading ---------------------------------------------------------------------------------


def contents(paths: Iterable[Path | Any], max_bytes: int) -> Iterator[bytes | ValueError]:
    """The content of each file, in order, or why it cannot be read.

    From a store, 256 files are requested at a time. Files of more than max_bytes are refused.
    """
    paths = iter(paths)
    while batch := list(islice(paths, 256)):
        if is_local(batch[0]):
            yield from (_content_or_error(path, max_bytes) for path in batch)
            continue
        # `cat` would read a name with brackets as a pattern.
        answers = batch[0].fs.cat_ranges([path.path for path in batch], 0, max_bytes + 1, on_error="return")
        for path, content in zip(batch, answers, strict=True):
            if isinstance(content, Exception):
                content = ValueError(f"{shown(str(path))}: {content}")
            elif len(content) > max_bytes:
                content = ValueError(_too_large(path, max_bytes))
            yield content


def _content_or_error(path: Path, max_bytes: int) -> bytes | ValueError:
    try:
        return read_file(path, max_bytes)
    except ValueError as error:
        return error


def open_file(path: Path | Any) -> io.BufferedReader:
    """A file to read, with a readline that takes a limit, which fsspec's files lack."""
    file = path.open("rb")
    return file if is_local(path) else io.BufferedReader(file)


def read_file(path: Path | Any, max_bytes: int = EXTENSIONS["jpg"]) -> bytes:
    """A file's content.

    Raises ValueError naming the file when it cannot be read or has more than max_bytes.
    """
    try:
        with path.open("rb") as file:
            # Reading max_bytes would allocate that much, also for a small local file.
            limit = min(max_bytes, os.fstat(file.fileno()).st_size) if is_local(path) else max_bytes
            content = file.read(limit + 1)
    except OSError as error:
        raise ValueError(f"{shown(str(path))}: {error.strerror or error}") from error
    if len(content) > max_bytes:
        raise ValueError(_too_large(path, max_bytes))
    return content


def _too_large(path: Path | Any, max_bytes: int) -> str:
    return f"{shown(str(path))}: more than the {max_bytes} bytes allowed"


# ---- a local copy ----------------------------------------------------------------------------


@contextmanager
def local_target(path: Path | Any) -> Iterator[Path]:
    """A local file to write, for use in a with statement.

    At the end it is uploaded to `path` if that is in a store, unless an error ended the block.
    """
    if is_local(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / path.name
        yield local
        if local.is_file():
            path.fs.put_file(str(local), path.path)


@contextmanager
def local_copy(path: Path | Any) -> Iterator[Path]:
    """A local file with the content of `path`, for use in a with statement."""
    if is_local(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / path.name
        path.fs.get_file(path.path, str(local))
        yield local
