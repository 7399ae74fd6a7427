"""Hugging Face datasets: by their name on the hub, or saved in a folder (needs datasets)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from data_tools.sources import Item, Layout, class_captions, texts
from data_tools.storage import read_file
from mmtensorar.data.url_cache import is_url


@lru_cache(maxsize=1)
def load(place: str, split: str) -> Any:
    """The split, with pictures left encoded. Code that comes with a dataset is never run: this library has no way to."""
    try:
        import datasets
    except ImportError:
        raise ValueError("Hugging Face datasets need a library: pip install 'mmtensorar[data]'") from None
    try:
        if (
            is_url(place)
            or (Path(place) / "dataset_dict.json").is_file()
            or (Path(place) / "dataset_info.json").is_file()
        ):
            found = datasets.load_from_disk(place)
            if isinstance(found, dict):
                if split not in found:
                    raise ValueError(f"{place}: no split {split!r}; found {', '.join(found)}")
                found = found[split]
        else:
            found = datasets.load_dataset(place, split=split)
    except Exception as error:  # the library raises what it likes, of many kinds
        if isinstance(error, ValueError) and str(error).startswith(place):
            raise
        reason = " ".join(str(error).split())[:500]
        raise ValueError(
            f"{place}: cannot be loaded as a dataset ({type(error).__name__}: {reason})"
        ) from error
    for name, feature in found.features.items():
        if isinstance(feature, datasets.Image):
            found = found.cast_column(name, datasets.Image(decode=False))
    return found


def items(place: str, layout: Layout) -> Iterator[Item]:
    """The rows of a split. The image column holds Image features or bytes; captions are texts, lists of them, or, with
    templates, a class label. Raises ValueError naming the dataset and the column or row.
    """
    found = load(place, layout.split)
    for column in (layout.image, *layout.captions):
        if column not in found.features:
            raise ValueError(
                f"{place}: expected a column {column!r}, found {', '.join(map(repr, found.features))}"
            )
    if not len(found):
        raise ValueError(f"{place}: no rows in split {layout.split!r}")
    labels = {
        name: feature for name in layout.captions if hasattr(feature := found.features[name], "int2str")
    }
    if labels and not layout.templates:
        raise ValueError(
            f"{place}: column {next(iter(labels))!r} holds class numbers; add --class-template 'a photo of a {{}}'"
        )
    fingerprint = found._fingerprint  # of everything the rows were made from
    for row, fields in enumerate(found.select_columns(list(layout.captions))):
        where = f"{place}: split {layout.split}, row {row}"
        meta = {
            "source": "dataset",
            "name": f"{Path(place).name} {layout.split} {row}",
            "fingerprint": fingerprint,
        }
        for name, feature in labels.items():
            if fields[name] is not None and fields[name] >= 0:
                fields[name] = list(class_captions(feature.int2str(fields[name]), layout))
            else:  # -1 stands for an unknown one
                fields[name] = None
        picture = partial(_picture, place, layout.split, layout.image, row)
        try:
            yield Item(f"{layout.split} {row}", picture, texts(fields, layout.captions, where), meta)
        except ValueError as error:
            yield Item(f"{layout.split} {row}", picture, (), meta, problem=str(error))


def _inside(name: str, place: str, where: str) -> Path:
    """A picture's file, which is in the dataset's own folder, or where the library keeps what it downloads."""
    import datasets

    path = Path(name).resolve()
    roots = [Path(datasets.config.HF_CACHE_HOME).resolve(), Path(datasets.config.HF_DATASETS_CACHE).resolve()]
    roots += [Path(place).resolve()] if Path(place).is_dir() else []
    if not path.is_file() or not any(path.is_relative_to(root) for root in roots):
        raise ValueError(f"{where}: image {name!r} is no file of the dataset")
    return path


def _picture(place: str, split: str, column: str, row: int) -> bytes:
    value = load(place, split)[row][column]  # mapped into memory: any row is as near as another
    where = f"{place}: split {split}, row {row}"
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            return read_file(_inside(value["path"], place, where))
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise ValueError(f"{where}: no picture in {column!r}")
    return value
