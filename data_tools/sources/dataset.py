"""Hugging Face datasets: by their name on the Hub, or saved in a folder (needs
`datasets`).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from data_tools import storage
from data_tools.sources import Item, Layout, Listing, Source
from data_tools.sources._rows import (
    captions_in,
    check_class_names,
    class_captions,
    match_columns,
    path_below,
    picture_in,
)
from mmtensorar.data.url_cache import is_url


def read(location: str, layout: Layout) -> Listing:
    """The rows of a split.

    The image column holds Image features or bytes. Captions are texts, lists of texts,
    or, with templates, a class label. Raises ValueError naming the dataset and the
    column or row.
    """
    rows = load_split(location, layout.split)
    layout = match_columns(list(rows.features), layout, location)
    if not len(rows):
        raise ValueError(f"{location}: no rows in split {layout.split!r}")
    labels = {name: feature for name in layout.captions if hasattr(feature := rows.features[name], "int2str")}
    if labels and not layout.templates:
        raise ValueError(
            f"{location}: column {next(iter(labels))!r} holds class numbers; "
            "add --class-template 'a photo of a {}'"
        )
    if layout.templates and not labels:
        print(f"note: {location}: --class-template has no effect: no caption is a class", file=sys.stderr)
    known = {name for feature in labels.values() for name in feature.names}
    check_class_names(sorted(known), layout, location)
    return Listing(_items(rows, location, layout, labels))


@lru_cache(maxsize=1)
def load_split(location: str, split: str) -> Any:
    """The split, with its pictures left encoded.

    Code that comes with a dataset is never run: the library no longer can.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError("Hugging Face datasets need a library: pip install 'mmtensorar[data]'") from None
    try:
        if is_url(location) or any(
            (Path(location) / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")
        ):
            rows = datasets.load_from_disk(location)
            if isinstance(rows, dict):
                if split not in rows:
                    raise ValueError(f"{location}: no split {split!r}; found {', '.join(rows)}")
                rows = rows[split]
        else:
            rows = datasets.load_dataset(location, split=split)
    except Exception as error:  # the library raises many kinds of errors
        if isinstance(error, ValueError) and str(error).startswith(location):
            raise
        reason = " ".join(str(error).split())[:500]
        raise ValueError(
            f"{location}: cannot be loaded as a dataset ({type(error).__name__}: {reason})"
        ) from error
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _items(rows: Any, location: str, layout: Layout, labels: dict[str, Any]) -> Iterator[Item]:
    """labels: column -> feature, of the columns that hold class labels."""
    fingerprint = rows._fingerprint  # of everything that the rows were made from
    stamp = _stamp(location)
    for row, fields in enumerate(_fields(rows.select_columns(list(layout.captions)))):
        where = f"{location}: split {layout.split}, row {row}"
        meta = {
            "source": "dataset",
            "name": f"{Path(location).name} {layout.split} {row}",
            "fingerprint": fingerprint,
        }
        if fields is None:
            problem = f"{where}: a column of captions holds text that is not UTF-8"
            yield Item(f"{layout.split} {row}", bytes, (), meta, problem=problem)
            continue
        for name, feature in labels.items():
            if fields[name] is not None and fields[name] >= 0:
                fields[name] = list(class_captions(feature.int2str(fields[name]), layout))
            else:  # -1 is an unknown label
                fields[name] = None
        picture = partial(_picture, location, layout.split, layout.image, row)
        try:
            captions = captions_in(fields, layout, where)
            yield Item(f"{layout.split} {row}", picture, captions, meta, stamp=stamp)
        except ValueError as error:
            yield Item(f"{layout.split} {row}", picture, (), meta, problem=str(error))


def _fields(rows: Any) -> Iterator[dict[str, Any] | None]:
    """The rows; None for one with text that is not UTF-8."""
    num_rows = 0
    try:
        for fields in rows:  # in batches, which is faster than one by one
            yield fields
            num_rows += 1
    except UnicodeDecodeError:
        pass
    for row in range(num_rows, len(rows)):
        try:
            fields = rows[row]
        except UnicodeDecodeError:
            fields = None
        yield fields


def _stamp(location: str) -> str:
    """A hash of when the files of a dataset on disk were written; empty for one on the
    hub.
    """
    if is_url(location) or not Path(location).is_dir():
        return ""
    listed = storage.files(Path(location))
    stamps = [[path.relative_to(location).as_posix(), status.stamp] for path, status in listed.items()]
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:16]


def _picture(location: str, split: str, column: str, row: int) -> bytes:
    value = load_split(location, split)[row][column]  # memory-mapped: every row is equally cheap
    where = f"{location}: split {split}, row {row}"
    return picture_in(value, column, where, lambda name: _path_in(location, name, where))


def _path_in(location: str, name: str, where: str) -> Path:
    """A picture's file.

    It must be in the dataset's own folder or in the library's caches. Links in these
    may lead out of them, as in every source.
    """
    import datasets

    roots = [Path(datasets.config.HF_CACHE_HOME), Path(datasets.config.HF_DATASETS_CACHE)]
    roots += [Path(location)] if Path(location).is_dir() else []
    for root in roots:
        for spelled in (Path(os.path.abspath(root)), root.resolve()):
            path = path_below(spelled, os.path.abspath(name))
            if path is not None and path.is_file():
                return path
    raise ValueError(f"{where}: image {name!r} is not a file of the dataset")


SOURCE = Source(
    "--dataset",
    "a Hugging Face dataset: NAME on the hub, or a folder that save_to_disk wrote",
    read,
    uses=("--image-column", "--split"),
    has_classes=True,
)
