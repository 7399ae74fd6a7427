"""Folders that shards are made from and put into: on a disk, or in an object store, by their URL.

A place is a pathlib.Path, or for a URL a UPath of universal-pathlib, which reads and writes through fsspec. What is written
appears under its name only when it is whole, in both.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from mmtensorar.remote import is_url, shown


def at(name: str) -> Path | Any:
    """The place of a name. Raises ValueError for a URL of another scheme, a command, or a library that is missing."""
    if not is_url(name):
        return Path(name)
    try:
        from upath import UPath

        # What a listing said is not kept: workers write to the place too.
        return UPath(name, use_listings_cache=False)
    except ImportError as error:
        raise ValueError(f"{shown(name)} needs a library: pip install 'mmtensorar[remote]' ({error})") from None


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
    """Every file below a folder and its bytes, where they are known, sorted by the parts of its name. Hidden ones are left out.

    Raises ValueError when the folder cannot be listed.
    """
    if is_local(root):
        found = {path: path.stat().st_size for path in root.rglob("*") if path.is_file()}
    else:
        try:
            listed = root.fs.find(root.path, detail=True)
        except OSError as error:
            raise ValueError(f"{shown(str(root))}: cannot be listed ({error})") from error
        # A name, unlike a path, is the same for a store and for UPath.
        found = {root / name.removeprefix(root.path).lstrip("/"): status.get("size") for name, status in listed.items()}
    return dict(sorted(((p, n) for p, n in found.items() if not p.name.startswith(".")), key=lambda pair: pair[0].parts))


def with_suffix(name: str, suffix: str) -> tuple[Path | Any, list[Path | Any]]:
    """The place of a name, and the files of a suffix below it, sorted, or the file that it is.

    Raises ValueError when there is none.
    """
    place = at(name)
    if place.is_file():
        return place, [place]
    if is_local(place) and not place.is_dir():
        raise ValueError(f"{place}: no such file or folder")
    found = [path for path in files(place) if path.suffix == suffix]
    if not found:
        raise ValueError(f"{shown(name)}: no {suffix} files in it")
    return place, found


def folders(root: Path | Any) -> tuple[str, ...]:
    """Names of the folders in a folder, sorted. Hidden ones are left out."""
    return tuple(sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")))


def contents(paths: Iterable[Path | Any]) -> Iterator[bytes | ValueError]:
    """The contents of files, in order, or why one cannot be read; of a store many are on their way at a time."""
    paths = iter(paths)
    while some := list(islice(paths, 256)):
        if is_local(some[0]):
            yield from map(_read_or_reason, some)
            continue
        names = [path.path for path in some]
        found = some[0].fs.cat(names, on_error="return")
        for path, name in zip(some, names, strict=True):
            content = found[name] if isinstance(found, dict) else found
            yield ValueError(f"{shown(str(path))}: {content}") if isinstance(content, Exception) else content


def opened(path: Path | Any) -> io.BufferedReader:
    """A file to read, with readline of a bounded length, which fsspec's files lack."""
    file = path.open("rb")
    return file if is_local(path) else io.BufferedReader(file)


def _read_or_reason(path: Path) -> bytes | ValueError:
    try:
        return read_file(path)
    except ValueError as error:
        return error


def read_file(path: Path | Any) -> bytes:
    """Raises ValueError naming the file when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{shown(str(path))}: {error.strerror or error}") from error


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


def store_errors() -> tuple[type[Exception], ...]:
    """What the libraries of object stores raise beside OSError, of those that are loaded."""
    names = [("botocore.exceptions", "BotoCoreError"), ("botocore.exceptions", "ClientError")]
    names += [("gcsfs.retry", "HttpError"), ("google.auth.exceptions", "GoogleAuthError"), ("aiohttp", "ClientError")]
    return tuple(getattr(sys.modules[module], name) for module, name in names if module in sys.modules)
