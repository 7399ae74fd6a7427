"""Where samples come from.

A source is one file in this folder, found by listing the folder.

The file defines `SOURCE`: the source's option of make_shards.py, and how its items are
read. Files whose names begin with an underscore are helpers; `_rows.py` has what
several sources need.

    from data_tools.sources import Item, Layout, Listing, Source

    def read(location: str, layout: Layout) -> Listing:
        return Listing(Item(key, picture, (caption,), {"source": "mine"}) for ...)

    SOURCE = Source("--mine", "what the help says", read)

A source yields its items in an order that depends on their content alone. An item's
picture is a function without arguments, so that listing a source is cheap, and a worker
process opens or draws the picture.
"""

from __future__ import annotations

import pickle
import pkgutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, overload

from PIL import Image

from data_tools.caption_columns import ColumnCount

READING = ("--image-column", "--image-root", "--split")  # options that not all sources use


class Item(NamedTuple):
    """One picture of a source.

    key: its name in the source. picture: returns its encoded bytes, or the drawn
    picture.
    captions: one or several to choose from. meta: content of the json member. group:
    items of one group are cheap to read together, and stay together when the order is
    shuffled.
    problem: why the item cannot be used, None when it can. stamp: changes when the file
    with the picture is written, and is not part of the sample; empty where that is
    unknown.
    """

    key: str
    picture: Callable[[], bytes | Image.Image]
    captions: tuple[str, ...]
    meta: dict
    group: str = ""
    problem: str | None = None
    stamp: str = ""


class Items(Sequence[Item]):
    """A list of items, each pickled: a source may have tens of millions of them.

    As objects, items would take 2.7 times as much memory. Only what this class has
    pickled itself is unpickled. groups: their names, in order of first use. group_of:
    the number of each item's group.
    """

    def __init__(self, items: Iterable[Item] = ()):
        names: dict[str, int] = {}
        self._pickled: list[bytes] = []
        self.group_of = array("l")
        for item in items:
            self._pickled.append(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))
            self.group_of.append(names.setdefault(item.group, len(names)))
        self.groups = tuple(names)

    def select(self, indices: Iterable[int]) -> Items:
        """The items at some indices, in that order."""
        selected = Items()
        indices = list(indices)
        selected._pickled = [self._pickled[index] for index in indices]
        selected.group_of = array("l", (self.group_of[index] for index in indices))
        selected.groups = self.groups
        return selected

    def __len__(self) -> int:
        return len(self._pickled)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Items: ...
    def __getitem__(self, index: int | slice) -> Item | Items:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        return pickle.loads(self._pickled[index])


@dataclass(frozen=True)
class Layout:
    """How to read a source, where it leaves a choice.

    Args:
        image, captions: Columns of a table, or keys of a JSON object.
        captions_given: Whether the command names the captions' columns.
        columns: Counts the rows that have them.
        root: Folder that paths are relative to; None is the folder of the table itself.
        split: Split of a dataset.
        templates: Captions from class names, with {} for the name. Without templates,
            class numbers are kept as captions.
        class_names: Folder name or class number -> class name.
        seed, image_size: For sources that draw their pictures.
        arguments: Values of the source's own options, by their names without dashes in
            front ("num_samples").
    """

    image: str = "image"
    captions: tuple[str, ...] = ("caption",)
    captions_given: bool = False
    columns: ColumnCount = field(default_factory=ColumnCount)
    root: Path | None = None
    split: str = "train"
    templates: tuple[str, ...] = ()
    class_names: Mapping[str, str] | None = None
    seed: int = 0
    image_size: int = 384
    arguments: Mapping[str, Any] = field(default_factory=dict)


class Listing(NamedTuple):
    """The items of a source.

    classes: names of the classes when captions are class numbers.
    """

    items: Iterator[Item]
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Source:
    """What a file of this folder declares.

    Args:
        option: The option of make_shards.py, such as "--class-folder".
        help: Help text of that option.
        read: (value of the option, Layout) -> Listing. It raises ValueError, naming the
            file, line or row, when the source as a whole is invalid or has no items.
            When a single item is invalid, the reason is the item's `problem`.
        choices: Values that the option takes, None for any path, URL or name.
        has_classes: Whether --class-template can make captions of its class names.
        uses: Options of reading that have an effect; others of READING are refused.
        is_drawn: The pictures are drawn in random order, and a larger set begins with
            the samples of a smaller one. So the set is not shuffled, and its name is
            the option's value alone.
        image_size: Default of --image-size.
        arguments: The source's own options -> keyword arguments of add_argument.
            Several sources may declare the same one.
    """

    option: str
    help: str
    read: Callable[[str, Layout], Listing]
    choices: tuple[str, ...] | None = None
    has_classes: bool = False
    uses: tuple[str, ...] = READING
    is_drawn: bool = False
    image_size: int = 384
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The option's name in parsed arguments, and of the source in manifests."""
        return self.option.lstrip("-").replace("-", "_")


def known_sources() -> dict[str, Source]:
    """Kind -> source, for each file of this folder, sorted by file name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [import_module(f"{__name__}.{name}") for name in names if not name.startswith("_")]
    return {module.SOURCE.kind: module.SOURCE for module in modules}
