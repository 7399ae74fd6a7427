"""Compressed tars: unpacked into a temporary file, so that any sample can be read
alone.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import tempfile
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.storage import shown
from mmtensorar.data.tars import Damage

BLOCK = 2**20  # bytes


def _open_zstd(file: BinaryIO) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ValueError("zstd needs pyarrow: pip install 'mmtensorar[data]', or unpack it first") from None
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")


OPENERS: dict[str, Callable[[Any], Any]] = {
    "gzip": gzip.open,
    "bzip2": bz2.open,
    "xz": lzma.open,
    "zstd": _open_zstd,
}


@lru_cache(maxsize=1)
def unpacked(path: Path, stamp: str, compression: str) -> BinaryIO:
    """A temporary file with the plain tar: a process holds one at a time, in the folder
    of TMPDIR.

    Args:
        path: Of the compressed tar, on disk or a UPath.
        stamp: Of the file, see `storage.FileStatus`: another content is unpacked again.
        compression: See `tars.compression`.

    Raises Damage, naming the file, when it cannot be unpacked, and ValueError when
    there is no room for it.
    """
    name = shown(str(path))
    if compression not in OPENERS:
        raise ValueError(f"{name}: compressed with {compression}, which is not read; unpack it first")
    target: Any = tempfile.TemporaryFile()
    with path.open("rb") as file:
        try:
            plain = OPENERS[compression](file)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        while block := _next_block(plain, name):
            try:
                target.write(block)
            except OSError as error:
                raise ValueError(
                    f"{name}: cannot be unpacked in {tempfile.gettempdir()} ({error.strerror}); "
                    "unpack it first, or name another folder in the variable TMPDIR"
                ) from error
    target.flush()
    return target


def _next_block(plain: Any, name: str) -> bytes:
    try:
        return plain.read(BLOCK)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise Damage(f"{name}: damaged or cut: it cannot be unpacked ({error})") from error
