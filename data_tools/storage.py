"""Folders that shards are made from and put into: on a disk, or in an object store, by their URL.

A place is a pathlib.Path, or for a URL a UPath of universal-pathlib, which reads and writes through fsspec. What is written
appears under its name only when it is whole, in both.
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
    """The place of a name. Raises ValueError for a URL of another scheme, a command, or a library that is missing."""
    if not is_url(name):
        return Path(name)
    try:
        from upath import UPath

        # What a listing said is not kept: workers write to the place too.
        return UPath(name, use_listings_cache=False)
    except ImportError as error:
        raise ValueError(
            f"{shown(name)} needs a library: pip install 'mmtensorar[remote]' ({error})"
        ) from None


def argument(name: str) -> Path | Any:
    """A place of the command line."""
    try:
        return at(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def folder_to_write(name: str) -> Path | Any:
    """A place of the command line that is written to."""
    if name.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(
            f"{shown(name)}: a web server takes no shards; expected a folder, s3://, gs:// or hf://"
        )
    return argument(name)


def is_local(place: Path | Any) -> bool:
    return isinstance(place, Path)


def files(root: Path | Any) -> dict[Path | Any, int | None]:
    """Every file below a folder and its bytes, where they are known, sorted by the parts of its name.

    Hidden ones are left out, and what is in hidden folders. Raises ValueError when the folder cannot be listed, and for a link
    that leads out of it: an archive that was unpacked here may have brought it.
    """
    if is_local(root):
        found, inside = {}, root.resolve()
        for path in root.rglob("*"):
            if not path.is_file() or _is_hidden(path, root):
                continue
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise ValueError(f"{path}: a link that leads out of {root}; put the file itself there")
            if not is_text(str(path)):
                raise ValueError(f"{str(path)!r}: a name that is not UTF-8; rename the file or folder")
            found[path] = path.stat().st_size
    else:
        try:
            listed = root.fs.find(root.path, detail=True)
        except OSError as error:
            raise ValueError(f"{shown(str(root))}: cannot be listed ({error})") from error
        # A name, unlike a path, is the same for a store and for UPath.
        found = {
            root / name.removeprefix(root.path).lstrip("/"): status.get("size")
            for name, status in listed.items()
        }
        found = {path: size for path, size in found.items() if not _is_hidden(path, root)}
    return dict(sorted(found.items(), key=lambda pair: pair[0].parts))


def _is_hidden(path: Path | Any, root: Path | Any) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def is_text(name: str) -> bool:
    """Whether a name can be written down: of a file whose name is no UTF-8 Python makes one that cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def with_suffix(name: str, suffix: str) -> tuple[Path | Any, list[Path | Any]]:
    """The place of a name, and the files of a suffix below it, sorted, or the file that it is.

    Raises ValueError when there is none.
    """
    place = at(name)
    if place.is_file():
        return place, [place]
    if is_local(place) and not place.is_dir():
        raise ValueError(f"{place}: no such file or folder")
    if suffix == ".tar" and (place / MANIFEST).is_file():
        # Of a shard set what it says: other tars beside them are of a work that was not finished.
        return place, [place / shard.name for shard in Manifest.read(place, complete=False).shards]
    found = [path for path in files(place) if path.suffix == suffix]
    if not found:
        raise ValueError(f"{shown(name)}: no {suffix} files in it")
    return place, found


def folders(root: Path | Any) -> tuple[str, ...]:
    """Names of the folders in a folder, sorted. Hidden ones are left out."""
    return tuple(
        sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    )


def contents(paths: Iterable[Path | Any], most: int) -> Iterator[bytes | ValueError]:
    """The contents of files of at most so many bytes, in order, or why one cannot be read.

    Of a store many are on their way at a time.
    """
    paths = iter(paths)
    while some := list(islice(paths, 256)):
        if is_local(some[0]):
            yield from (_read_or_reason(path, most) for path in some)
            continue
        # Not cat, which takes a name with brackets for a pattern.
        found = some[0].fs.cat_ranges([path.path for path in some], 0, most + 1, on_error="return")
        for path, content in zip(some, found, strict=True):
            if isinstance(content, Exception):
                content = ValueError(f"{shown(str(path))}: {content}")
            elif len(content) > most:
                content = ValueError(_too_large(path, most))
            yield content


def opened(path: Path | Any) -> io.BufferedReader:
    """A file to read, with readline of a bounded length, which fsspec's files lack."""
    file = path.open("rb")
    return file if is_local(path) else io.BufferedReader(file)


def _read_or_reason(path: Path, most: int) -> bytes | ValueError:
    try:
        return read_file(path, most)
    except ValueError as error:
        return error


def read_file(path: Path | Any, most: int = EXTENSIONS["jpg"]) -> bytes:
    """Raises ValueError naming the file when it cannot be read, or has more bytes than `most`."""
    try:
        with path.open("rb") as file:
            # Of a small file no buffer of `most` bytes.
            content = file.read(
                min(most, os.fstat(file.fileno()).st_size) + 1 if is_local(path) else most + 1
            )
    except OSError as error:
        raise ValueError(f"{shown(str(path))}: {error.strerror or error}") from error
    if len(content) > most:
        raise ValueError(_too_large(path, most))
    return content


def _too_large(path: Path | Any, most: int) -> str:
    return f"{shown(str(path))}: more than the {most} bytes allowed"


@contextmanager
def written(path: Path | Any) -> Iterator[Path]:
    """Where to write a file on the disk; at the end of the with statement it is at its place, unless an error ended it."""
    if is_local(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / path.name
        yield local
        if local.is_file():
            path.fs.put_file(str(local), path.path)


@contextmanager
def fetched(path: Path | Any) -> Iterator[Path]:
    """A file on the disk, for the time of the with statement."""
    if is_local(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / path.name
        path.fs.get_file(path.path, str(local))
        yield local
