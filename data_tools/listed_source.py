"""List a source's items, choose their captions, and put them into the set's order."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data_tools import storage
from data_tools.sources import Item, Items, Layout, Source, known_sources
from data_tools.sources._rows import parse_object
from data_tools.storage import is_local, read_file
from mmtensorar.data.url_cache import is_url
from mmtensorar.files import MARK
from mmtensorar.seeds import generator_for


class ListedSource(NamedTuple):
    """The items of a set, in its order, with one caption each.

    name: for the manifest. classes: names of the classes when captions are class
    numbers.
    state: a hash of the stamps of its files; empty where they have none.
    notes: sentences about the source, for the end.
    """

    name: str
    items: Items
    classes: tuple[str, ...] | None = None
    state: str = ""
    notes: tuple[str, ...] = ()


def list_source(options: argparse.Namespace) -> ListedSource:
    """List the source that the options of make_shards.py name."""
    source, location = known_sources()[options.source], options.location
    if not source.is_drawn and _is_same_folder(location, options.out):
        raise ValueError(f"{location}: source and --out are the same folder; choose another --out")
    layout = _layout(source, options)
    listing = source.read(location, layout)
    digest = SourceDigest([location, str(options.image_root or "")])
    stamps = Stamps()
    stop_at_problem = options.on_error == "raise" and not options.dry_run

    def chosen_items() -> Iterator[Item]:
        for item in tqdm(listing.items, desc="listing", unit=" images", disable=None):
            if item.problem and stop_at_problem:  # reported now, not hours later when its part is made
                raise ValueError(f"{item.problem}; to leave such samples out add --on-error skip")
            for chosen in choose_captions(item, options.captions, options.seed):
                digest.add(chosen)
                stamps.add(chosen)
                yield chosen

    items = Items(chosen_items())
    notes = tuple(layout.columns.notes(location, layout.captions, layout.captions_given))
    if source.is_drawn:
        return ListedSource(location, items[: options.limit], listing.classes, notes=notes)
    name = f"{source.kind} {_location_name(location)} {digest.hexdigest()}"
    items = shuffle_items(items, options.seed)[: options.limit]
    return ListedSource(name, items, listing.classes, stamps.state, notes)


def _is_same_folder(location: str, out: Path) -> bool:
    return not is_url(location) and is_local(out) and Path(location).resolve() == out.resolve()


def _layout(source: Source, options: argparse.Namespace) -> Layout:
    names = [option.lstrip("-").replace("-", "_") for option in source.arguments]
    return Layout(
        image=options.image_column,
        captions=options.caption_columns or ("caption",),
        captions_given=options.caption_columns is not None,
        root=options.image_root,
        split=options.split,
        templates=tuple(options.class_template),
        class_names=read_class_names(options.class_names) if options.class_names else None,
        seed=options.seed,
        image_size=options.image_size,
        arguments={name: getattr(options, name) for name in names},
    )


def read_class_names(path: Path) -> dict[str, str]:
    """A JSON object, folder name or class number -> class name.

    Raises ValueError for anything else.
    """
    expected = 'an object such as {"n01440764": "tench"}'
    names = parse_object(read_file(path), str(path), expected)
    if not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{path}: expected {expected}")
    # Files that were joined may have marks in the middle.
    return {key.lstrip(MARK): name.lstrip(MARK) for key, name in names.items()}


class SourceDigest:
    """A hash that changes when the source does. It does not read the pictures.

    It covers names, captions, metadata (with file sizes) and groups of the items, and
    the locations that are URLs: a folder may be moved, but another URL has other
    content.
    """

    def __init__(self, locations: list[str]):
        urls = [location if is_url(location) else "" for location in locations]
        self._digest = hashlib.sha256(json.dumps(urls).encode())

    def add(self, item: Item) -> None:
        fields = [item.key, item.captions, item.meta, item.group]
        self._digest.update(json.dumps(fields, sort_keys=True, default=str).encode())

    def hexdigest(self) -> str:
        return self._digest.hexdigest()[:16]


class Stamps:
    """A hash of the stamps of items, see `sources.Item`: it changes when a picture is
    edited.
    """

    def __init__(self):
        self._digest = hashlib.sha256()
        self._has_any = False

    def add(self, item: Item) -> None:
        self._digest.update(json.dumps([item.key, item.stamp]).encode())
        self._has_any |= bool(item.stamp)

    @property
    def state(self) -> str:
        """The hash; empty when no item had a stamp."""
        return self._digest.hexdigest()[:16] if self._has_any else ""


def _location_name(location: str) -> str:
    """Last part of a folder, file or URL; a dataset's name as it is."""
    if is_url(location):
        return storage.at(location).name
    return Path(location).resolve().name if Path(location).exists() else location


def choose_captions(item: Item, choice: str, seed: int) -> list[Item]:
    """The item with one caption, or a copy of the item for each caption.

    choice: first or random (one caption), or each (one copy per caption).
    """
    if item.problem or len(item.captions) == 1:
        return [item]
    if choice == "each":
        return [item._replace(captions=(caption,)) for caption in item.captions]
    index = int(generator_for(seed, item.key).integers(len(item.captions))) if choice == "random" else 0
    return [item._replace(captions=(item.captions[index],))]


def shuffle_items(items: Items, seed: int) -> Items:
    """The items in random order.

    Items of one group stay together, in random order within the group.
    """
    rng = np.random.default_rng(seed)
    if len(items.groups) == 1:
        return items.select(rng.permutation(len(items)))
    members: list[list[int]] = [[] for _ in items.groups]
    for index, group in enumerate(items.group_of):
        members[group].append(index)
    shuffled = [
        members[group][i]
        for group in rng.permutation(len(members))
        for i in rng.permutation(len(members[group]))
    ]
    return items.select(shuffled)
