"""Shard sets at a URL, read through a bounded cache on the local disk.

A shard is downloaded completely before it is read: into a partial file, which a later
attempt or process continues, and which gets its final name only when its SHA-256 is the
manifest's. All processes of a machine may share one cache: with one lock for each
shard, one process downloads while the others wait, and a shard that is being read is
never removed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from mmtensorar.data.shards import MANIFEST, Manifest, Shard
from mmtensorar.files import move, sha256

SCHEMES = ("http", "https", "s3", "gs", "hf")
MAX_MANIFEST = 2**28  # bytes
CHUNK = 2**20  # bytes read at a time
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")
FINAL = (400, 401, 403, 404, 405, 410, 451)  # HTTP answers that another attempt would not change


def is_url(name: str) -> bool:
    """Whether a name is a URL of SCHEMES.

    Raises ValueError for any other URL, and for a command.
    """
    scheme, separator, _ = name.partition("://")
    if name.startswith("pipe:") or (separator and scheme not in SCHEMES):
        raise ValueError(
            f"{shown(name)!r} is refused; expected a folder, or a URL that begins with {', '.join(SCHEMES)}"
        )
    if not separator:
        return False
    if "@" in urlsplit(name).netloc:
        raise ValueError(
            f"{shown(name)}: a user or password in a URL is refused, messages and logs would show it"
        )
    if urlsplit(name).query or urlsplit(name).fragment:
        raise ValueError(
            f"{shown(name)} has a query; expected the URL of a folder, with {MANIFEST} and the shards in it"
        )
    return True


def shown(url: str) -> str:
    """A URL as messages show it: without password and query, which may be secrets."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "the URL"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def store_errors() -> tuple[type[Exception], ...]:
    """Errors of object-store libraries that are not OSErrors, from the libraries that
    are loaded.
    """
    names = [("botocore.exceptions", "BotoCoreError"), ("botocore.exceptions", "ClientError")]
    names += [
        ("gcsfs.retry", "HttpError"),
        ("google.auth.exceptions", "GoogleAuthError"),
        ("aiohttp", "ClientError"),
    ]
    return tuple(getattr(sys.modules[module], name) for module, name in names if module in sys.modules)


class Unreachable(ValueError):
    """A file cannot be downloaded, or is not the one that the manifest names."""


class Refused(Unreachable):
    """Another attempt would give the same answer."""


class Cache:
    """A bounded folder of downloaded shards; several processes may share it.

    Args:
        folder: Where the shards are kept.
        max_bytes: Of all files in it together.
        timeout_s: A connection that brings no byte for this long fails.
        attempts: Give up after this many failures in a row without progress.
        wait_s: Seconds to wait after the first failure; doubled after each further one.
    """

    def __init__(
        self,
        folder: Path | str,
        max_bytes: int,
        *,
        timeout_s: float = 60,
        attempts: int = 6,
        wait_s: float = 1,
    ) -> None:
        self.folder, self.max_bytes = Path(folder).expanduser(), max_bytes
        self.timeout_s, self.attempts, self.wait_s = timeout_s, attempts, wait_s

    def manifest(self, url: str) -> Manifest:
        """The manifest of the set at a URL.

        Raises ValueError, naming it, when it cannot be downloaded or is not valid.
        """
        url = f"{url.rstrip('/')}/{MANIFEST}"
        content = bytearray()

        def attempt() -> None:
            total, start, chunks = _open_url(url, len(content), self.timeout_s)
            if total is not None and total > MAX_MANIFEST:
                raise Refused(f"{shown(url)} has {total} bytes, more than the {MAX_MANIFEST} allowed")
            del content[start:]
            for chunk in chunks:
                content.extend(chunk)
                if len(content) > MAX_MANIFEST:
                    raise Refused(f"{shown(url)} has more than the {MAX_MANIFEST} bytes allowed")

        self._retry(url, attempt, lambda: len(content))
        return Manifest.parse_bytes(bytes(content), shown(url))

    @contextmanager
    def local_path(self, url: str, shard: Shard) -> Iterator[Path]:
        """The local path of a set's complete shard, for use in a with statement.

        Raises ValueError, naming the URL, when the shard cannot be downloaded, is not
        the manifest's, or does not fit into the cache.
        """
        url = f"{url.rstrip('/')}/{shard.name}"
        name = hashlib.sha256(f"{url} {shard.sha256}".encode()).hexdigest()[:32]
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.tar"
        while True:
            with self._locked(name, fcntl.LOCK_SH):
                if path.is_file():
                    os.utime(path)  # marks it as the most recently used
                    yield path
                    return
            with self._locked(name, fcntl.LOCK_EX):
                if not path.is_file():
                    self._download(url, shard.sha256, path)

    def size(self, url: str, shard: Shard) -> int | None:
        """Bytes of a shard, None if the server does not send it.

        Raises ValueError like local_path.
        """
        url = f"{url.rstrip('/')}/{shard.name}"
        sizes: list[int | None] = []

        def attempt() -> None:
            total, _, chunks = _open_url(url, 0, self.timeout_s)
            chunks.close()
            sizes.append(total)

        self._retry(url, attempt, lambda: 0)
        return sizes[-1]

    # ---- downloading -------------------------------------------------------------------------

    def _download(self, url: str, expected: str, path: Path) -> None:
        """Download a file to `path`.

        expected: its SHA-256; a wrong file is downloaded once more.
        """
        partial, wanted = path.with_suffix(".part"), path.with_suffix(".want")
        digest = ""
        try:
            for _ in range(2):
                self._retry(url, lambda: self._continue(url, partial, wanted), lambda: _size(partial))
                digest = sha256(partial)
                if digest == expected:
                    move(partial, path)
                    return
                partial.unlink()
        finally:
            wanted.unlink(missing_ok=True)
        raise Unreachable(
            f"{shown(url)}: its sha256 is {digest[:12]}, the manifest's {expected[:12]}: "
            "the set changed, or is damaged"
        )

    def _continue(self, url: str, partial: Path, wanted: Path) -> None:
        """Append the missing bytes to the partial file, over one connection.

        If the server cannot resume, the file starts again.
        """
        total, start, chunks = _open_url(url, _size(partial), self.timeout_s)
        if total is not None:
            self._make_room(total, wanted, url)
        with partial.open("r+b" if partial.exists() else "wb") as file:
            file.truncate(start)
            file.seek(start)
            for chunk in chunks:
                if total is None:
                    self._make_room(file.tell() + len(chunk), wanted, url)
                file.write(chunk)

    def _retry(self, url: str, attempt: Callable[[], None], progress: Callable[[], int]) -> None:
        """Call attempt until it succeeds.

        Failures count only while `progress`, the number of bytes received, does not
        grow.
        """
        failures = 0
        while True:
            before = progress()
            try:
                attempt()
                return
            except Refused:
                raise
            except (OSError, HTTPException, EOFError, *store_errors()) as error:
                if type(error).__name__ in NO_CREDENTIALS:
                    raise Refused(f"{shown(url)}: {_reason(error)}") from None
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise ValueError(
                        f"{self.folder}: {error.strerror}; lower data.cache_gb or name another data.cache"
                    ) from error
                failures = 1 if progress() > before else failures + 1
                if failures >= self.attempts:
                    raise Unreachable(
                        f"{shown(url)}: {failures} attempts failed, the last with: {_reason(error)}"
                    ) from error
                time.sleep(min(60, self.wait_s * 2 ** (failures - 1)) * random.uniform(0.5, 1))

    # ---- keeping within the bound --------------------------------------------------------------

    def _make_room(self, num_bytes: int, wanted: Path, url: str) -> None:
        """Reserve num_bytes for a file.

        Removes the least recently used shards until the file fits, then records its
        size in the file `wanted`, which the other processes count. Waits up to
        timeout_s for shards that are in use.
        """
        if num_bytes > self.max_bytes:
            raise Refused(
                f"{shown(url)} has {num_bytes} bytes or more, data.cache_gb allows {self.max_bytes} in all"
            )
        deadline = time.monotonic() + self.timeout_s
        while True:
            with self._locked("cache", fcntl.LOCK_EX):  # one process counts at a time
                if self._evict(num_bytes, wanted.stem):
                    wanted.write_text(str(num_bytes))
                    return
            if time.monotonic() > deadline:
                raise Refused(
                    f"{shown(url)}: no room for its {num_bytes} bytes: the {self.max_bytes} bytes of "
                    "data.cache_gb are in use; raise it"
                )
            time.sleep(0.05)

    def _evict(self, num_bytes: int, new_name: str) -> bool:
        """Remove unused shards until num_bytes fit. Returns whether they fit.

        new_name: the shard that needs the space; its files do not count.
        """
        sizes: dict[str, int] = {}
        ages: list[tuple[float, str]] = []
        for path in self.folder.iterdir():
            if path.suffix not in (".tar", ".part", ".want") or path.stem == new_name:
                continue
            try:
                status = path.stat()
                size = int(path.read_text() or 0) if path.suffix == ".want" else status.st_size
            except (FileNotFoundError, ValueError):
                continue
            sizes[path.stem] = max(size, sizes.get(path.stem, 0))
            ages.append((status.st_mtime, path.stem))
        for _, name in sorted(ages):
            if sum(sizes.values()) + num_bytes <= self.max_bytes:
                break
            if name in sizes and self._remove_unused(name):
                del sizes[name]
        return sum(sizes.values()) + num_bytes <= self.max_bytes

    def _remove_unused(self, name: str) -> bool:
        """Remove a shard unless some process uses it.

        Returns whether it was removed.
        """
        try:
            with self._locked(name, fcntl.LOCK_EX | fcntl.LOCK_NB):
                for suffix in (".tar", ".part", ".want"):
                    (self.folder / f"{name}{suffix}").unlink(missing_ok=True)
                return True
        except BlockingIOError:
            return False

    @contextmanager
    def _locked(self, name: str, mode: int) -> Iterator[None]:
        # Lock files are empty, and stay: removing one would let two processes lock one
        # name.
        with (self.folder / f"{name}.lock").open("w") as file:
            fcntl.flock(file, mode)
            yield


# ---- reading from a URL ------------------------------------------------------------------------


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _reason(error: BaseException) -> str:
    text = " ".join(str(getattr(error, "reason", "") or error).split())
    return text[:200] or type(error).__name__


# Bytes of the whole file (None if unknown), the offset at which the answer begins, and
# the bytes from there.
Answer = tuple[int | None, int, Generator[bytes, None, None]]


def _open_url(url: str, start: int, timeout_s: float) -> Answer:
    """Open a file at an offset.

    Raises Refused, or an OSError after which another attempt may succeed.
    """
    if url.startswith(("http://", "https://")):
        return _open_http(url, start, timeout_s)
    return _open_store(url, start)


def _open_http(url: str, start: int, timeout_s: float) -> Answer:
    # urllib: its timeout holds for each read, and it needs no event loop in forked
    # workers.
    headers = {"User-Agent": "mmtensorar"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout_s)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the partial file is longer than what the server has now
            return _open_http(url, 0, timeout_s)
        if error.code in FINAL:
            raise Refused(f"{shown(url)}: HTTP {error.code} {error.reason}") from None
        raise OSError(f"HTTP {error.code} {error.reason}") from None
    if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        start = 0
    length = response.headers.get("Content-Length")
    total = start + int(length) if length is not None and length.isdigit() else None
    return total, start, _chunks(response, None if total is None else total - start)


def _open_store(url: str, start: int) -> Answer:
    """Open a file of an object store, through fsspec."""
    try:
        import fsspec

        system, path = fsspec.url_to_fs(url)
        file = system.open(path, "rb", block_size=4 * CHUNK, cache_type="readahead")
    except ImportError as error:
        raise Refused(f"{shown(url)} needs a library: pip install 'mmtensorar[remote]' ({error})") from None
    except (FileNotFoundError, PermissionError) as error:
        raise Refused(f"{shown(url)}: {_reason(error) or 'not found'}") from None
    except ValueError as error:
        raise Refused(f"{shown(url)}: {_reason(error)}") from None
    start = min(start, file.size)
    file.seek(start)
    return file.size, start, _chunks(file, file.size - start)


def _chunks(stream: Any, length: int | None) -> Generator[bytes, None, None]:
    """The bytes of a stream, at most `length`.

    Raises OSError when the stream ends before that.
    """
    num_bytes = 0
    # read1 returns what a socket has received; read would lose it when the connection
    # stalls.
    read = getattr(stream, "read1", stream.read)
    with stream:
        while chunk := read(CHUNK if length is None else min(CHUNK, length - num_bytes)):
            num_bytes += len(chunk)
            yield chunk
    if length is not None and num_bytes < length:
        raise OSError(f"the transfer ended after {num_bytes} of {length} bytes")
