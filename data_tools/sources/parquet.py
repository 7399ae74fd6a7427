"""Parquet files with captions, and pictures as bytes or as paths (needs pyarrow)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from data_tools import storage
from data_tools.sources import Item, Layout, Listing, Source
from data_tools.sources._rows import captions_in, match_columns, path_in, picture_in, row_item
from mmtensorar.folders import LeftOut
from mmtensorar.words import counted

MAX_GROUP = 2 * 10**9  # bytes


def read(location: str, layout: Layout) -> Listing:
    """The rows of a file, or of all .parquet files below a folder.

    The image column holds paths, bytes, or Hugging Face's {"bytes", "path"}. The rows
    of a row group form a group. Raises ValueError naming file and column, or row.
    """
    return Listing(_items(location, layout))


def _items(location: str, layout: Layout) -> Iterator[Item]:
    path, files = storage.with_suffix(location, ".parquet")
    num_rows, left_out = 0, LeftOut(path)
    for file in files:
        name = file.relative_to(path).as_posix() if file != path else path.name
        before = num_rows
        for item in _file_items(file, name, layout):
            num_rows += 1
            yield item
        if num_rows == before:
            left_out.add("no rows in it", file)
    left_out.print()
    if not num_rows:
        raise ValueError(f"{path}: no rows in it")


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("Parquet needs pyarrow: pip install 'mmtensorar[data]'") from None
    return pyarrow


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """A ParquetFile, to be read with use_threads=False.

    Neither reading ahead nor threads: pyarrow's threads may free bytes that a Python
    file gave them after the interpreter has begun to end, and then the process aborts
    ("terminate called without an active exception", exit code 134).
    """
    with path.open("rb") as stream, _arrow().parquet.ParquetFile(stream, pre_buffer=False) as file:
        yield file


def _file_items(path: Path, name: str, layout: Layout) -> Iterator[Item]:
    """The rows of one file. name: of the file, for keys."""
    arrow = _arrow()
    root = (layout.root or path.parent).resolve()
    try:
        with _open(path) as file:
            schema = file.schema_arrow
            layout = match_columns(schema.names, layout, str(path))
            has_paths = _holds_paths(arrow, schema, layout, path)
            # Workers read the bytes of pictures later. Other columns that are neither
            # text nor numbers are left out.
            plain = [
                field.name for field in schema if _is_plain(arrow, field.type) and field.name != layout.image
            ]
            paths = [layout.image] if has_paths else []
            columns = [*paths, *dict.fromkeys([*layout.captions, *plain])]
            stamp = storage.stamp(path)
            _check_num_rows(file.metadata, path)
            for group in range(file.num_row_groups):
                _check_size(file.metadata.row_group(group), group, path)
                table = file.read_row_group(group, columns=columns, use_threads=False)
                num_rows = file.metadata.row_group(group).num_rows
                # A footer with a flipped bit makes pyarrow return fewer rows.
                rows = _fields(table) if table.num_rows == num_rows else [None] * num_rows
                for row, fields in enumerate(rows):
                    key, where = f"{name} {group} {row}", f"{path}: row group {group}, row {row}"
                    if fields is None or isinstance(fields, str):
                        problem = f"{where}: column {fields!r} holds text that is not UTF-8"
                        if fields is None:
                            read = counted(table.num_rows, "row")
                            problem = f"{where}: damaged ({read} of {num_rows} in the group can be read)"
                        yield Item(key, bytes, (), {"source": "parquet", "name": key}, problem=problem)
                    elif has_paths:
                        yield row_item(key, fields, layout, root, where, "parquet")
                    else:
                        picture = partial(_picture, path, stamp, group, row, layout.image, root)
                        item = _bytes_item(key, picture, fields, layout, where)
                        yield item._replace(group=f"{name} {group}", stamp=stamp)
    except UnicodeDecodeError:  # of rows it is a problem of their own
        raise ValueError(f"{path}: damaged (the name of a column is not UTF-8)") from None
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a complete Parquet file ({error})") from error


def _fields(table: Any) -> list[dict[str, Any] | str]:
    """The rows of a table; for a row with text that is not UTF-8, the column's name."""
    try:
        return table.to_pylist()
    except UnicodeDecodeError:
        return [_row_fields(table.slice(number, 1)) for number in range(table.num_rows)]


def _row_fields(row: Any) -> dict[str, Any] | str:
    fields = {}
    for name in row.column_names:
        try:
            fields[name] = row.column(name).to_pylist()[0]
        except UnicodeDecodeError:
            return name
    return fields


def _holds_paths(arrow: Any, schema: Any, layout: Layout, path: Path) -> bool:
    """Whether the image column holds paths, not bytes.

    Raises ValueError when it holds neither.
    """
    kind = _value_type(arrow, schema.field(layout.image).type)
    if arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind):
        return False
    if arrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return False
    if arrow.types.is_string(kind) or arrow.types.is_large_string(kind):
        return True
    raise ValueError(f"{path}: column {layout.image!r} holds {kind}; expected paths or bytes of pictures")


def _bytes_item(key: str, picture: Any, fields: dict, layout: Layout, where: str) -> Item:
    """The item of a row whose picture is in the file. picture: reads it."""
    others = {k: v for k, v in fields.items() if k not in layout.captions and v is not None}
    meta = {"source": "parquet", "name": key} | ({"fields": others} if others else {})
    try:
        captions, problem = captions_in(fields, layout, where), None
    except ValueError as error:
        captions, problem = (), str(error)
    return Item(key, picture, captions, meta, problem=problem)


def _check_num_rows(metadata: Any, path: Path) -> None:
    """Raise ValueError when the footer contradicts itself about the number of rows."""
    in_groups = sum(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    if in_groups != metadata.num_rows:
        raise ValueError(
            f"{path}: damaged: {counted(metadata.num_rows, 'row')} by its footer, but {in_groups} in its row "
            "groups"
        )


def _check_size(metadata: Any, group: int, path: Path) -> None:
    """Raise ValueError for a row group with more bytes than a worker should hold.

    metadata: of the group. Its columns are not asked: on a damaged footer that ends the
    process (pyarrow 26).
    """
    if metadata.total_byte_size > MAX_GROUP:
        raise ValueError(
            f"{path}: row group {group} holds {metadata.total_byte_size / 1e9:.1f} GB, more than "
            f"{MAX_GROUP / 1e9:.1f}; write the file again with row_group_size=1000"
        )


def _value_type(arrow: Any, kind: Any) -> Any:
    """The type of a column's values, which may be stored as numbers in a dictionary."""
    return kind.value_type if arrow.types.is_dictionary(kind) else kind


def _is_plain(arrow: Any, kind: Any) -> bool:
    types, kind = arrow.types, _value_type(arrow, kind)
    return (
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_integer(kind)
        or types.is_boolean(kind)
        or types.is_floating(kind)
    )


def _picture(path: Path, stamp: str, group: int, row: int, column: str, root: Path) -> bytes:
    where = f"{path}: row group {group}, row {row}"
    value = _column(path, stamp, group, column)[row].as_py()
    return picture_in(value, column, where, lambda name: path_in(root, name, where))


@lru_cache(maxsize=1)
def _column(path: Path, stamp: str, group: int, column: str) -> Any:
    """The encoded pictures of a row group: all that a worker holds of a file."""
    arrow = _arrow()
    if storage.stamp(path) != stamp:
        raise ValueError(f"{path}: it changed while it was read")
    try:
        with _open(path) as file:
            pictures = file.read_row_group(group, columns=[column], use_threads=False).column(0)
            num_rows = file.metadata.row_group(group).num_rows
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: row group {group}: damaged ({error})") from error
    if len(pictures) != num_rows:
        raise ValueError(
            f"{path}: row group {group}: damaged ({len(pictures)} of {num_rows} rows can be read)"
        )
    return pictures


SOURCE = Source(
    "--parquet",
    "a Parquet file, or a folder of them, with columns image (path, bytes or both) and caption",
    read,
    uses=("--image-column", "--image-root"),
)
