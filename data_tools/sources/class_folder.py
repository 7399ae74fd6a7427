"""Pictures in one sub-folder per class, like an unpacked ImageNet, or torchvision's
ImageFolder.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_tools import storage
from data_tools.sources import Item, Layout, Listing, Source
from data_tools.sources._rows import check_class_names, class_captions, find_pictures, unnamed_item
from data_tools.storage import read_file
from mmtensorar.folders import LeftOut, identity


def read(location: str, layout: Layout) -> Listing:
    """Every picture below the sub-folders.

    The caption is the class number, or made from the class name by templates. A link
    in a class to the whole folder, to another class, or to a folder that an earlier
    class has read is left out. Raises ValueError for a class that is another one by a
    link, and for a class without pictures: leaving it out would shift the later
    numbers, and keeping it would never train its number.
    """
    root = storage.at(location)
    left_out = LeftOut(root)
    names = class_names(root, left_out)
    check_class_names(names, layout, str(root))
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
    if storage.is_local(root):
        if bad := next((name for name in names if not storage.is_utf8(name)), None):
            raise ValueError(storage.name_problem(root / bad))
        _check_distinct(root, names)
    return names


def _check_distinct(root: Path, names: tuple[str, ...]) -> None:
    known = {identity(root): "the whole folder"}
    # Folders before links, so that the message names the link.
    for name in sorted(names, key=lambda name: ((root / name).is_symlink(), name)):
        first = known.setdefault(identity(root / name), f"the class {name!r}")
        if first != f"the class {name!r}":
            raise ValueError(f"{root}: {name!r} is {first} under another name; remove the link")


def _items(root: Path, names: tuple[str, ...], layout: Layout, left_out: LeftOut) -> Iterator[Item]:
    others = {root, *(root / name for name in names)} if storage.is_local(root) else set()
    for number, name in enumerate(names):
        found = find_pictures(root / name, left_out, entered=others - {root / name})[0]
        if storage.is_local(root):
            others |= {path.parent for path in found}  # links of later classes may lead there
        for path, status in found.items():
            if not storage.is_utf8(str(path)):
                yield unnamed_item(path, root, "class_folder")
                continue
            meta = {"source": "class_folder", "name": path.relative_to(root).as_posix(), "class": name}
            captions = class_captions(name, layout) or (str(number),)
            meta["num_bytes"] = status.num_bytes
            yield Item(meta["name"], partial(read_file, path), captions, meta, stamp=status.stamp)
    left_out.print()


SOURCE = Source(
    "--class-folder",
    "images in one sub-folder per class; the sorted names give the class numbers",
    read,
    uses=(),
    has_classes=True,
)
