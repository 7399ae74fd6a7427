"""Pictures in one sub-folder per class, as ImageNet is unpacked and torchvision's ImageFolder reads it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from data_tools import storage
from data_tools.sources import Item, Layout, class_captions, images
from data_tools.storage import read_file


def class_names(place: str) -> tuple[str, ...]:
    """Names of a folder's sub-folders, sorted: a class's place in them is its number.

    Hidden ones are none: an editor's folder would shift every number. Raises ValueError when there is no sub-folder.
    """
    root = storage.at(place)
    if storage.is_local(root) and not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    names = storage.folders(root)
    if not names:
        raise ValueError(f"{root}: no sub-folders in it; expected one per class")
    return names


def items(place: str, layout: Layout) -> Iterator[Item]:
    """Every jpg, png and webp below the sub-folders; the caption is its class's number, or made of the name by templates.

    Pictures beside the sub-folders are left out. Raises ValueError for a class without pictures: left out, it would
    shift the numbers of those after it, and kept, its number would never be trained.
    """
    root = storage.at(place)
    for number, name in enumerate(class_names(place)):
        for path, size in images(root / name)[0].items():
            meta = {"source": "class_folder", "name": path.relative_to(root).as_posix(), "class": name}
            captions = class_captions(name, layout) or (str(number),)
            meta["num_bytes"] = size
            yield Item(meta["name"], partial(read_file, path), captions, meta)
