"""Folders that shards are made from and written to: on disk, or in an object store, by
URL.

Paths are pathlib.Path, or UPath (universal-pathlib) for a URL, which reads and writes
through fsspec. A file appears under its name only when it is complete, in both.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import io
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from mmtensorar import cli
from mmtensorar import folders as listing
from mmtensorar.data.shards import EXTENSIONS, MANIFEST, Manifest
from mmtensorar.data.url_cache import is_url, shown, store_errors
from mmtensorar.folders import FileStatus, LeftOut

# Files that are tars by their names. Those of the second kind are refused.
TARS = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz")
REFUSED_TARS = (
    ".tar.lz4",
    ".tar.lz",
    ".tlz",
    ".tar.lzma",
    ".tar.z",
    ".taz",
    ".tar.br",
    ".tar.lzo",
    ".tar.sz",
)


def at(name: str) -> Path | Any:
    """The path that a name or URL means.

    Raises ValueError for a URL of an unknown scheme, a shell command, or a missing
    library.
    """
    if not is_url(name):
        return Path(name)
    try:
        from upath import UPath

        # Listings are not cached: workers write to the same folder.
        return UPath(name.rstrip("/"), use_listings_cache=False)
    except ImportError as error:
        raise ValueError(
            f"{shown(name)} needs a library: pip install 'mmtensorar[remote]' ({error})"
        ) from None


def argument(name: str) -> Path | Any:
    """A path on the command line (an argparse type)."""
    try:
        return at(cli.not_empty(name))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def folder_to_write(name: str) -> Path | Any:
    """A folder on the command line that is written to (an argparse type)."""
    if name.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(
            f"{shown(name)}: cannot write shards to a web server; expected a folder, s3://, gs:// or hf://"
        )
    return argument(name) if is_url(name) else cli.folder_to_write(name)


def is_local(path: Path | Any) -> bool:
    """Whether a path is on disk, not in a store."""
    return isinstance(path, Path)


# ---- listing ---------------------------------------------------------------------------------


def files(
    root: Path | Any, left_out: LeftOut | None = None, *, entered: Iterable[Path] = ()
) -> dict[Path | Any, FileStatus]:
    """Every file below a folder, sorted by the parts of its path:
    `mmtensorar.folders.walk`.

    Args:
        root: On disk, or in a store, where there are no links.
        left_out: Receives what is not read.
        entered: Folders that are not entered, on disk.

    Names may be not UTF-8 (see `is_utf8`). Raises ValueError when the folder cannot be
    listed.
    """
    left_out = left_out or LeftOut(root)
    if not is_local(root):
        found = _store_files(root, left_out)
        return dict(sorted(found.items(), key=lambda pair: pair[0].parts))
    return listing.walk(root, left_out, entered=entered)


def stamp(path: Path | Any) -> str:
    """The stamp of a file: it changes when the file is written. Some stores do not say
    when.
    """
    if not is_local(path):
        return hashlib.sha256(str(path.fs.ukey(path.path)).encode()).hexdigest()[:16]
    return listing.status_of(path.stat()).stamp


# What stores say about the content of a file, or when it was written.
VERSIONS = ("ETag", "etag", "md5Hash", "generation", "LastModified", "last_modified", "updated", "mtime")


def _store_files(root: Any, left_out: LeftOut) -> dict[Any, FileStatus]:
    with _listing(root):
        listed = root.fs.find(root.path, detail=True)
        if not listed:  # some stores give no reason here
            root.fs.ls(root.path, detail=False)
    found, hidden = {}, set()
    for name, status in listed.items():
        # A relative name, unlike a path, is the same for a store and for UPath.
        parts = name.removeprefix(root.path).lstrip("/").split("/")
        first = next((number for number, part in enumerate(parts, 1) if listing.is_hidden(part)), None)
        if first is not None:
            hidden.add("/".join(parts[:first]))
            continue
        versions = [str(status[key]) for key in VERSIONS if status.get(key)]
        digest = hashlib.sha256(" ".join(versions).encode()).hexdigest()[:16] if versions else ""
        found[root / "/".join(parts)] = FileStatus(status.get("size"), digest)
    for name in sorted(hidden):
        left_out.add(listing.HIDDEN, root / name)
    return found


@contextmanager
def _listing(root: Path | Any) -> Iterator[None]:
    """Raises ValueError, naming a URL, for the errors of its store while it is
    listed.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{shown(str(root))}: no such file or folder") from None
    except (OSError, *store_errors()) as error:
        raise ValueError(f"{shown(str(root))}: cannot be listed ({error})") from error


def is_utf8(name: str) -> bool:
    """Whether a file name is valid UTF-8.

    Python marks undecodable bytes with surrogates.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def name_problem(path: Path) -> str:
    """Why a file whose name is not UTF-8 cannot be used."""
    return f"{str(path)!r}: a name that is not UTF-8; rename the file or folder"


def with_suffix(name: str, *suffixes: str) -> tuple[Path | Any, dict[Path | Any, FileStatus]]:
    """The path that a name means, and its files with a suffix (in any case), sorted.

    The files are the path itself if it is a file, else all below it. Others are counted
    in a note. Raises ValueError when there are none, and for one whose name is not
    UTF-8.
    """
    path = at(name)
    if path.is_file() and not _is_page_of_folder(path, suffixes):
        return path, {path: FileStatus(None, stamp(path))}
    if is_local(path) and not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    if ".tar" in suffixes and (path / MANIFEST).is_file():
        return path, _shards(path)
    left_out = LeftOut(path)
    found = {}
    for file, status in files(path, left_out).items():
        if not file.name.lower().endswith(suffixes):
            left_out.add("not a tar" if ".tar" in suffixes else f"not {suffixes[0]}", file)
        elif is_local(file) and not is_utf8(str(file)):
            raise ValueError(name_problem(file))
        else:
            found[file] = status
    left_out.print()
    if not found:
        known = ", ".join(suffix for suffix in suffixes if suffix not in REFUSED_TARS)
        raise ValueError(f"{shown(name)}: no files in it that end in {known}")
    return path, found


def _is_page_of_folder(path: Path | Any, suffixes: tuple[str, ...]) -> bool:
    """Whether a file is a web server's page about a folder."""
    return not is_local(path) and not path.name.lower().endswith(suffixes) and path.is_dir()


def _shards(folder: Path | Any) -> dict[Path | Any, FileStatus]:
    """Only the shards of the manifest, in its order: other tars belong to unfinished
    work.
    """
    manifest = Manifest.read(folder, complete=False)
    if not is_local(folder):
        return {folder / shard.name: FileStatus(None, "") for shard in manifest.shards}
    note_unlisted(folder, manifest)
    paths = [folder / shard.name for shard in manifest.shards]
    return {path: FileStatus(None, stamp(path) if path.is_file() else "") for path in paths}


def note_unlisted(folder: Path, manifest: Manifest) -> None:
    """Print a note when a set's folder holds tars, at any depth, that its manifest does
    not name: nobody reads them.
    """
    left_out = LeftOut(folder)
    names = {shard.name for shard in manifest.shards}
    for path in listing.walk(folder, LeftOut(folder)):  # unfinished work is hidden
        name = path.name.lower()
        is_tar = ".tar" in name or name.endswith((*TARS, *REFUSED_TARS))
        if is_tar and path.relative_to(folder).as_posix() not in names:
            left_out.add(f"not in {MANIFEST}", path)
    left_out.print()


def folders(root: Path | Any, left_out: LeftOut) -> tuple[str, ...]:
    """Names of the folders in a folder, sorted.

    left_out: receives hidden entries, and files. Raises ValueError for a link without a
    target: it may have been a folder.
    """
    names = []
    with _listing(root):
        entries = sorted(root.iterdir(), key=lambda path: path.name)
    for path in entries:
        if listing.is_hidden(path.name):
            left_out.add(listing.HIDDEN, path)
        elif path.is_dir():
            names.append(path.name)
        elif is_local(path) and not path.exists():
            raise ValueError(f"{path}: a link without a target; restore the folder, or remove the link")
        else:
            left_out.add("beside the folders", path)
    return tuple(names)


# ---- reading ---------------------------------------------------------------------------------


def contents(paths: Iterable[Path | Any], max_bytes: int) -> Iterator[bytes | ValueError]:
    """The content of each file, in order, or why it cannot be read.

    From a store, 256 files are requested at a time. Files of more than max_bytes are
    refused.
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


# ---- writing ---------------------------------------------------------------------------------


@contextmanager
def only_writer(folder: Path | Any, *, locks: bool = True) -> Iterator[None]:
    """While the block runs, no other process that calls this writes into a folder on
    disk.

    The folder is created, and removed if it is still empty at the end. On a file system
    without locks nothing is locked.

    Args:
        locks: False does nothing, for a process that does not write.

    Raises ValueError when another process has it.
    """
    if not locks or not is_local(folder) or folder.is_file():
        yield
        return
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another process is writing into this folder; wait for it, or choose another one"
            ) from None
        except OSError:  # this file system has no locks
            pass
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # forked workers hold it too
        os.close(handle)
        with suppress(OSError):  # it is not empty
            for path in created:
                path.rmdir()


# ---- a local copy ----------------------------------------------------------------------------


@contextmanager
def local_target(path: Path | Any) -> Iterator[Path]:
    """A local file to write, for use in a with statement.

    At the end it is uploaded to `path` if that is in a store, unless an error ended the
    block.
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
