"""Shard sets at a URL, read through a bounded cache on the local disk.

A shard is downloaded whole before it is read: into a partial file, which a later attempt or process goes on with, and which
gets its name only when its SHA-256 is the manifest's. All processes of a machine may share one cache: a lock per shard lets
one download while the others wait, and keeps a shard that is being read from being removed.
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
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from mmtensorar.data.shards import MANIFEST, Manifest, Shard
from mmtensorar.files import sha256

SCHEMES = ("http", "https", "s3", "gs", "hf")
MAX_MANIFEST = 2**28  # bytes
PIECE = 2**20  # bytes read at a time
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")
FINAL = (400, 401, 403, 404, 405, 410, 451)  # HTTP answers that another attempt would not change


def is_url(place: str) -> bool:
    """Whether a place is a URL of SCHEMES. Raises ValueError for any other URL, and for a command."""
    scheme, separator, _ = place.partition("://")
    if place.startswith("pipe:") or (separator and scheme not in SCHEMES):
        raise ValueError(
            f"{shown(place)!r} is refused; expected a folder, or a URL that begins with {', '.join(SCHEMES)}"
        )
    if not separator:
        return False
    if "@" in urlsplit(place).netloc:
        raise ValueError(
            f"{shown(place)}: a user or password in a URL is refused, messages and logs would show it"
        )
    if urlsplit(place).query or urlsplit(place).fragment:
        raise ValueError(
            f"{shown(place)} has a query; expected the URL of a folder, with {MANIFEST} and the shards in it"
        )
    return True


def shown(url: str) -> str:
    """A URL for messages, without password and query, which may be secrets."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "the URL"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def store_errors() -> tuple[type[Exception], ...]:
    """What the libraries of object stores raise beside OSError, of those that are loaded."""
    names = [("botocore.exceptions", "BotoCoreError"), ("botocore.exceptions", "ClientError")]
    names += [
        ("gcsfs.retry", "HttpError"),
        ("google.auth.exceptions", "GoogleAuthError"),
        ("aiohttp", "ClientError"),
    ]
    return tuple(getattr(sys.modules[module], name) for module, name in names if module in sys.modules)


class Unreachable(ValueError):
    """A file that cannot be had, or is not the one that it should be."""


class Refused(Unreachable):
    """An answer that another attempt would not change."""


class Cache:
    """folder: may be shared by processes. max_bytes: of all files in it together. timeout_s: without a byte.

    attempts: in a row without progress, before it is given up. wait_s: after the first failure; twice as long after each.
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
        """The manifest of the set at a URL. Raises ValueError, naming it, when it cannot be had or is not valid."""
        place = f"{url.rstrip('/')}/{MANIFEST}"
        content = bytearray()

        def attempt() -> None:
            total, start, pieces = _opened(place, len(content), self.timeout_s)
            if total is not None and total > MAX_MANIFEST:
                raise Refused(f"{shown(place)} has {total} bytes, more than the {MAX_MANIFEST} allowed")
            del content[start:]
            for piece in pieces:
                content.extend(piece)
                if len(content) > MAX_MANIFEST:
                    raise Refused(f"{shown(place)} has more than the {MAX_MANIFEST} bytes allowed")

        self._tried(place, attempt, lambda: len(content))
        return Manifest.parse_bytes(bytes(content), shown(place))

    @contextmanager
    def opened(self, url: str, shard: Shard) -> Iterator[Path]:
        """The local path of a set's shard, whole, for the time of a with statement.

        Raises ValueError, naming the URL, when it cannot be had, is not the manifest's, or does not fit into the cache.
        """
        place = f"{url.rstrip('/')}/{shard.name}"
        name = hashlib.sha256(f"{place} {shard.sha256}".encode()).hexdigest()[:32]
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.tar"
        while True:
            with self._locked(name, fcntl.LOCK_SH):
                if path.is_file():
                    os.utime(path)  # it is the last used now
                    yield path
                    return
            with self._locked(name, fcntl.LOCK_EX):
                if not path.is_file():
                    self._download(place, shard.sha256, path)

    def size(self, url: str, shard: Shard) -> int | None:
        """Bytes of a shard, None where the server does not tell. Raises ValueError like `opened`."""
        place, found = f"{url.rstrip('/')}/{shard.name}", []

        def attempt() -> None:
            total, _, pieces = _opened(place, 0, self.timeout_s)
            pieces.close()
            found.append(total)

        self._tried(place, attempt, lambda: 0)
        return found[-1]

    # ---- downloading -------------------------------------------------------------------------

    def _download(self, place: str, digest: str, path: Path) -> None:
        partial, wanted = path.with_suffix(".part"), path.with_suffix(".want")
        try:
            for _ in range(2):
                self._tried(place, lambda: self._piece(place, partial, wanted), lambda: _size(partial))
                found = sha256(partial)
                if found == digest:
                    os.replace(partial, path)
                    return
                partial.unlink()
        finally:
            wanted.unlink(missing_ok=True)
        raise Unreachable(
            f"{shown(place)}: its sha256 is {found[:12]}, the manifest's {digest[:12]}: the set changed, or is damaged"
        )

    def _piece(self, place: str, partial: Path, wanted: Path) -> None:
        """One connection: append to the partial file what is missing of it, or begin again where a server cannot go on."""
        total, start, pieces = _opened(place, _size(partial), self.timeout_s)
        if total is not None:
            self._make_room(total, wanted, place)
        with partial.open("r+b" if partial.exists() else "wb") as file:
            file.truncate(start)
            file.seek(start)
            for piece in pieces:
                if total is None:
                    self._make_room(file.tell() + len(piece), wanted, place)
                file.write(piece)

    def _tried(self, place: str, attempt, progress) -> None:
        """Call attempt until it succeeds. Failures count only while nothing more arrives."""
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
                    raise Refused(f"{shown(place)}: {_reason(error)}") from None
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise ValueError(
                        f"{self.folder}: {error.strerror}; lower data.cache_gb or name another data.cache"
                    ) from error
                failures = 1 if progress() > before else failures + 1
                if failures >= self.attempts:
                    raise Unreachable(
                        f"{shown(place)}: {failures} attempts failed, the last with: {_reason(error)}"
                    ) from error
                time.sleep(min(60, self.wait_s * 2 ** (failures - 1)) * random.uniform(0.5, 1))

    # ---- keeping within the bound --------------------------------------------------------------

    def _make_room(self, num_bytes: int, wanted: Path, place: str) -> None:
        """Remove the shards that were used longest ago until so many bytes fit beside the others, and note them in `wanted`."""
        if num_bytes > self.max_bytes:
            raise Refused(
                f"{shown(place)} has {num_bytes} bytes or more, data.cache_gb allows {self.max_bytes} in all"
            )
        deadline = time.monotonic() + self.timeout_s
        while True:
            with self._locked("cache", fcntl.LOCK_EX):
                sizes: dict[str, int] = {}
                ages: list[tuple[float, str]] = []
                for path in self.folder.iterdir():
                    if path.suffix not in (".tar", ".part", ".want") or path.stem == wanted.stem:
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
                    if name in sizes and self._removed(name):
                        del sizes[name]
                if sum(sizes.values()) + num_bytes <= self.max_bytes:
                    wanted.write_text(str(num_bytes))  # while nobody else counts
                    return
            if time.monotonic() > deadline:
                raise Refused(
                    f"{shown(place)}: no room for its {num_bytes} bytes: the {self.max_bytes} of data.cache_gb are in use; raise it"
                )
            time.sleep(0.05)

    def _removed(self, name: str) -> bool:
        """Whether nobody uses a shard; then it is gone."""
        try:
            with self._locked(name, fcntl.LOCK_EX | fcntl.LOCK_NB):
                for suffix in (".tar", ".part", ".want"):
                    (self.folder / f"{name}{suffix}").unlink(missing_ok=True)
                return True
        except BlockingIOError:
            return False

    @contextmanager
    def _locked(self, name: str, how: int) -> Iterator[None]:
        # Lock files stay: removing one would let two processes hold locks of one name. They are empty.
        with (self.folder / f"{name}.lock").open("w") as file:
            fcntl.flock(file, how)
            yield


# ---- reading from a place ----------------------------------------------------------------------


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _reason(error: BaseException) -> str:
    text = " ".join(str(getattr(error, "reason", "") or error).split())
    return text[:200] or type(error).__name__


def _opened(place: str, start: int, timeout_s: float) -> tuple[int | None, int, Iterator[bytes]]:
    """Bytes in all, where the answer begins, and the bytes from there. Raises Refused, or an OSError worth another attempt."""
    if place.startswith(("http://", "https://")):
        return _http(place, start, timeout_s)
    return _fsspec(place, start)


def _http(place: str, start: int, timeout_s: float) -> tuple[int | None, int, Iterator[bytes]]:
    # By the standard library: its timeouts hold for each read, and it needs no event loop in forked workers.
    headers = {"User-Agent": "mmtensorar"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(place, headers=headers), timeout=timeout_s)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the partial file is longer than what is there now
            return _http(place, 0, timeout_s)
        if error.code in FINAL:
            raise Refused(f"{shown(place)}: HTTP {error.code} {error.reason}") from None
        raise OSError(f"HTTP {error.code} {error.reason}") from None
    if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        start = 0
    length = response.headers.get("Content-Length")
    total = start + int(length) if length is not None and length.isdigit() else None
    return total, start, _pieces(response, None if total is None else total - start)


def _fsspec(place: str, start: int) -> tuple[int | None, int, Iterator[bytes]]:
    try:
        import fsspec

        system, path = fsspec.url_to_fs(place)
        file = system.open(path, "rb", block_size=4 * PIECE, cache_type="readahead")
    except ImportError as error:
        raise Refused(f"{shown(place)} needs a library: pip install 'mmtensorar[remote]' ({error})") from None
    except (FileNotFoundError, PermissionError) as error:
        raise Refused(f"{shown(place)}: {_reason(error) or 'not found'}") from None
    except ValueError as error:
        raise Refused(f"{shown(place)}: {_reason(error)}") from None
    start = min(start, file.size)
    file.seek(start)
    return file.size, start, _pieces(file, file.size - start)


def _pieces(stream, length: int | None) -> Iterator[bytes]:
    """The bytes of a stream. Raises OSError when there are fewer than announced; more are not read."""
    read = 0
    # Of a socket, what is there: read would throw away what came before a stall.
    some = getattr(stream, "read1", stream.read)
    with stream:
        while piece := some(PIECE if length is None else min(PIECE, length - read)):
            read += len(piece)
            yield piece
    if length is not None and read < length:
        raise OSError(f"the transfer ended after {read} of {length} bytes")
