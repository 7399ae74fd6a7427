"""Pictures in one sub-folder per class, like an unpacked ImageNet, or torchvision's
ImageFolder.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_tools import storage
from data_tools.sources import Item, Layout, Listing, Source
from data_tools.sources._rows import class_captions, find_pictures
from data_tools.storage import read_file
from mmtensorar.folders import LeftOut


def read(location: str, layout: Layout) -> Listing:
    """Every picture below the sub-folders.

    The caption is the class number, or made from the class name by templates. A link
    from one class into another, or to the folder itself, is left out. Raises ValueError
    for a class without pictures: leaving it out would shift the later numbers, and
    keeping it would never train its number.
    """
    root = storage.at(location)
    left_out = LeftOut(root)
    names = class_names(root, left_out)
    return Listing(_items(root, names, layout, left_out), None if layout.templates else names)


def class_names(root: Path, left_out: LeftOut) -> tuple[str, ...]:
    """Names of a folder's sub-folders, sorted: a class's index is its number.

    Hidden folders are left out: an editor's folder would shift every number. left_out
    receives them, and files. Raises ValueError when there is no sub-folder.
    """
    if storage.is_local(root) and not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    names = storage.folders(root, left_out)
    if not names:
        raise ValueError(f"{root}: no sub-folders in it; expected one per class")
    return names


def _items(root: Path, names: tuple[str, ...], layout: Layout, left_out: LeftOut) -> Iterator[Item]:
    for number, name in enumerate(names):
        others = [root, *(root / other for other in names if other != name)] if storage.is_local(root) else []
        for path, status in find_pictures(root / name, left_out, entered=others)[0].items():
            meta = {"source": "class_folder", "name": path.relative_to(root).as_posix(), "class": name}
            captions = class_captions(name, layout) or (str(number),)
            meta["num_bytes"] = status.num_bytes
            yield Item(meta["name"], partial(read_file, path), captions, meta, stamp=status.stamp)
    left_out.print()


SOURCE = Source(
    "--class-folder",
    "images in one sub-folder per class; the sorted names give the class numbers",
    read,
    has_classes=True,
)
