"""Parquet files with captions, and pictures as bytes or as paths (needs pyarrow)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from data_tools import storage
from data_tools.sources import Item, Layout, inside, of_row, texts
from data_tools.storage import read_file

MAX_GROUP = 2 * 10**9  # bytes of pictures


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("Parquet needs pyarrow: pip install 'mmtensorar[data]'") from None
    return pyarrow


def items(place: str, layout: Layout) -> Iterator[Item]:
    """The rows of a file, or of all .parquet files below a folder. The image column holds paths, bytes, or Hugging Face's
    {"bytes", "path"}. The rows of a row group form a group. Raises ValueError naming file and column, or row.
    """
    path, files = storage.with_suffix(place, ".parquet")
    rows = 0
    for file in files:
        for item in _file(file, file.relative_to(path).as_posix() if file != path else path.name, layout):
            rows += 1
            yield item
    if not rows:
        raise ValueError(f"{path}: no rows in it")


def _file(path: Path, name: str, layout: Layout) -> Iterator[Item]:
    arrow = _arrow()
    root = (layout.root or path.parent).resolve()
    try:
        with path.open("rb") as stream, arrow.parquet.ParquetFile(stream) as file:
            schema = file.schema_arrow
            for column in (layout.image, *layout.captions):
                if schema.names.count(column) != 1:
                    raise ValueError(
                        f"{path}: expected one column {column!r}, found {', '.join(map(repr, schema.names))}"
                    )
            kind = schema.field(layout.image).type
            of_bytes = arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)
            of_struct = arrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
            if not (
                of_bytes or of_struct or arrow.types.is_string(kind) or arrow.types.is_large_string(kind)
            ):
                raise ValueError(
                    f"{path}: column {layout.image!r} holds {kind}; expected paths or bytes of pictures"
                )
            # Bytes are read later, by the workers; what else a row holds beside text and numbers is left out.
            plain = [
                field.name for field in schema if _is_plain(arrow, field.type) and field.name != layout.image
            ]
            paths = [] if of_bytes or of_struct else [layout.image]
            stamp = _stamp(path)
            for group in range(file.num_row_groups):
                _check_size(file, group, layout.image, path)
                table = file.read_row_group(
                    group, columns=[*paths, *dict.fromkeys([*layout.captions, *plain])]
                )
                for row, fields in enumerate(table.to_pylist()):
                    key, where = f"{name} {group} {row}", f"{path}: row group {group}, row {row}"
                    if paths:
                        yield of_row(key, fields, layout, root, where, "parquet")
                        continue
                    others = {k: v for k, v in fields.items() if k not in layout.captions and v is not None}
                    meta = {"source": "parquet", "name": key} | ({"fields": others} if others else {})
                    try:
                        captions, problem = texts(fields, layout.captions, where), None
                    except ValueError as error:
                        captions, problem = (), str(error)
                    picture = partial(_picture, path, stamp, group, row, layout.image, root)
                    yield Item(key, picture, captions, meta, f"{name} {group} {stamp}", problem)
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole Parquet file ({error})") from error


def _check_size(file: Any, group: int, column: str, path: Path) -> None:
    """Raise ValueError for a row group whose pictures are too many to hold, as each worker does."""
    found = file.metadata.row_group(group)
    parts = (found.column(number) for number in range(found.num_columns))
    size = sum(part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] == column)
    if size > MAX_GROUP:
        raise ValueError(
            f"{path}: row group {group} holds {size / 1e9:.1f} GB of pictures, more than {MAX_GROUP / 1e9:.1f}; write the file again "
            "with row_group_size=1000"
        )


def _is_plain(arrow: Any, kind: Any) -> bool:
    types = arrow.types
    return (
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_integer(kind)
        or types.is_boolean(kind)
        or types.is_floating(kind)
    )


def _stamp(path: Path) -> str:
    """Size and time of change, since reading all bytes to tell a changed file from the old one would take too long."""
    if not storage.is_local(path):
        return hashlib.sha256(str(path.fs.ukey(path.path)).encode()).hexdigest()[:16]
    status = path.stat()
    return hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:16]


def _picture(path: Path, stamp: str, group: int, row: int, column: str, root: Path) -> bytes:
    where = f"{path}: row group {group}, row {row}"
    value = _column(path, stamp, group, column)[row].as_py()
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            return read_file(inside(root, value["path"], where))
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise ValueError(f"{where}: no bytes of a picture in {column!r}")
    return value


@lru_cache(maxsize=1)
def _column(path: Path, stamp: str, group: int, column: str) -> Any:
    """The pictures of a row group, still encoded: all that a worker holds of a file."""
    arrow = _arrow()
    if _stamp(path) != stamp:
        raise ValueError(f"{path}: it changed while it was read")
    try:
        with path.open("rb") as stream, arrow.parquet.ParquetFile(stream) as file:
            return file.read_row_group(group, columns=[column]).column(0)
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: row group {group}: damaged ({error})") from error
