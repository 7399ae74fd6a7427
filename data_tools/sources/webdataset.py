"""WebDataset tars, ours or others': members {key}.jpg, {key}.txt, {key}.json,
{key}.cls.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from data_tools import storage
from data_tools.sources import Item, Layout, Listing, Source
from data_tools.sources._packed import unpacked
from data_tools.sources._rows import SUFFIXES, captions_in, class_captions, parse_object
from mmtensorar.data import tars
from mmtensorar.data.members import decode_caption
from mmtensorar.data.shards import EXTENSIONS, MANIFEST, Manifest
from mmtensorar.files import decode_text
from mmtensorar.folders import LeftOut, is_hidden

TEXT = ("txt", "text", "caption")
PICTURES = tuple(sorted(suffix[1:] for suffix in SUFFIXES))
COMMON = ("jpeg", "jpg", "png", "webp")  # where there is one of these, others are previews or masks


def read(location: str, layout: Layout) -> Listing:
    """The samples of a tar, or of all tars below a folder, in their order.

    The caption is in the txt member, or under the caption keys of the json member, or
    it is the class number in the cls member (or made from the class name). With
    templates or class names the cls member comes first; captions that are not used then
    are counted, and so are samples without a class. Other members are not read; their
    number is printed. If the folder has a manifest of ours, json members are kept and
    its class names are used. The samples of a compressed tar form a group.

    Raises ValueError for a damaged tar, and one that is compressed in a way that is not
    read.
    """
    manifest = own_manifest(location)
    class_names = layout.class_names
    if class_names is None and manifest is not None and manifest.classes is not None:
        class_names = {str(number): name for number, name in enumerate(manifest.classes)}
    tar_set = TarSet(
        replace(layout, class_names=class_names),
        keeps_meta=manifest is not None,
        is_numbered=manifest is not None and manifest.classes is not None,
        by_class=bool(layout.templates or layout.class_names),
    )
    classes = None
    if class_names and not layout.templates:
        classes = _numbered(class_names, location)
    return Listing(tar_set.items(location), classes)


def own_manifest(location: str) -> Manifest | None:
    """The manifest of a folder that make_shards.py made, None for others' tars."""
    folder = storage.at(location)
    return Manifest.read(folder, complete=False) if (folder / MANIFEST).is_file() else None


def _numbered(names: Mapping[str, str], location: str) -> tuple[str, ...]:
    """Class names in the order of their numbers, which must be 0, 1, 2, ..."""
    missing = [str(number) for number in range(len(names)) if str(number) not in names]
    if missing:
        raise ValueError(
            f"{location}: {len(names)} class names, but none for class {missing[0]}; "
            "expected numbers from 0 on"
        )
    return tuple(names[str(number)] for number in range(len(names)))


@dataclass
class TarSet:
    """How the tars are read.

    keeps_meta: keep the content of json members. is_numbered: txt members hold class
    numbers. by_class: captions are made of classes. ignored: counts members of other
    kinds. notes: counts samples whose caption is not where the options ask for it.
    """

    layout: Layout
    keeps_meta: bool
    is_numbered: bool
    by_class: bool = False
    ignored: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def items(self, location: str) -> Iterator[Item]:
        path, files = storage.with_suffix(location, *storage.TARS, *storage.REFUSED_TARS)
        num_samples, left_out = 0, LeftOut(path)
        for file, status in files.items():
            name = file.relative_to(path).as_posix() if file != path else path.name
            before = num_samples
            for item in self._tar_items(file, name, status.stamp):
                num_samples += 1
                yield item
            if num_samples == before:
                left_out.add("no samples in it", file)
        left_out.print()
        if self.ignored:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.ignored.most_common(5))
            print(f"note: left out members of other kinds: {kinds}", file=sys.stderr)
        for note, count in self.notes.items():
            print(f"note: {path}: {note}: {count}", file=sys.stderr)
        if not num_samples:
            raise ValueError(f"{path}: no samples in it")

    def _tar_items(self, path: Path, name: str, stamp: str) -> Iterator[Item]:
        packed = _compression(path)
        is_sorted = False  # whether the members of every sample are together, as far as known
        with tars.TarReader(path, packed and unpacked(path, stamp, packed)) as file:
            for group in tars.group_members(file, path, self._split_name, folders=True):
                group.check_unique(path)
                if group.is_complete:
                    item = self._item(TarSample(file, path, group), name, stamp, packed)
                    if item.problem and not is_sorted:
                        self._check_sorted(file, path)
                        is_sorted = True
                    yield item._replace(stamp=stamp, group=name if packed else "")

    def _check_sorted(self, file: tars.TarReader, path: Path) -> None:
        """Raise ValueError when a sample's members are not together: it would seem to
        lack its caption or picture.
        """
        split_name = replace(self, ignored=Counter())._split_name
        with suppress(tars.Damage):  # it is reported when it is reached
            for _ in tars.group_members(file, path, split_name, folders=True):
                pass

    def _split_name(self, member: tars.Member) -> tuple[str, str] | None:
        folder, _, plain = member.name.rpartition("/")
        if not plain:  # a folder
            return None
        # Such as ._a.jpg, which macOS adds to a.jpg.
        if any(is_hidden(part) for part in member.name.split("/") if part not in (".", "..")):
            self.ignored["hidden"] += 1
            return None
        stem, _, extension = plain.partition(".")
        return f"{folder}/{stem}".removeprefix("/").removeprefix("./"), extension.lower()

    def _item(self, sample: TarSample, name: str, stamp: str, packed: str | None) -> Item:
        members = sample.group.members
        used = (*picture_kinds(members), *TEXT, "json", "cls")
        self.ignored.update(f".{kind}" for kind in members if kind not in used)
        key = f"{name} {sample.group.key}"
        meta = {"source": "webdataset", "name": key}
        try:
            picture = sample.picture()
            captions = self._captions(sample)
            if self.keeps_meta and "json" in members:
                meta = sample.json() or meta
        except ValueError as error:
            return Item(key, bytes, (), {"source": "webdataset", "name": key}, problem=str(error))
        read = partial(_read, sample.path, picture, stamp, packed)
        return Item(key, read, captions, {"num_bytes": picture.size} | meta)

    def _captions(self, sample: TarSample) -> tuple[str, ...]:
        members = sample.group.members
        sample.check_sizes((*TEXT, "json", "cls"))
        if self.by_class and not self.is_numbered:
            # A column that is named, and exists, comes before a template.
            if "cls" in members and not (self.layout.templates and self.layout.captions_given):
                if any(kind in members for kind in (*TEXT, "json")):
                    self.notes["samples with a class, whose .txt or .json is not the caption"] += 1
                return self._class_member_captions(sample)
            if not self.layout.templates:
                raise ValueError(
                    f"{sample.where}: no class number; with --class-names expected a cls member, "
                    f"found {', '.join(members)}"
                )
            if "cls" not in members:
                self.notes["samples without a class, where --class-template has no effect"] += 1
        captions = self._text_captions(sample)
        if not captions:
            return self._class_member_captions(sample)
        kinds = [kind for kind in (*TEXT, "json", "cls") if kind in members]
        for kind in kinds[1:]:
            if kind != "json" or not self.keeps_meta:
                self.notes[f"samples whose .{kinds[0]} is the caption, and not their .{kind}"] += 1
        return captions

    def _text_captions(self, sample: TarSample) -> tuple[str, ...]:
        """From the txt or json member; empty when there is a class instead."""
        members, columns = sample.group.members, self.layout.captions
        for extension in TEXT:
            if extension in members:
                self.layout.columns.num_texts += 1
                caption = decode_caption(sample.content(extension), sample.where)
                return self._class_captions(caption, sample.where) if self.is_numbered else (caption,)
        if "json" in members:
            fields = sample.json()
            if "cls" not in members or any(fields.get(column) for column in columns):
                return captions_in(fields, self.layout, sample.where)
            if self.layout.captions_given:  # they are in no row, perhaps
                self.layout.columns.add(fields, columns)
        return ()

    def _class_member_captions(self, sample: TarSample) -> tuple[str, ...]:
        members = sample.group.members
        if "cls" not in members:
            raise ValueError(
                f"{sample.where}: no caption; expected a txt or json member, found {', '.join(members)}"
            )
        number = decode_text(sample.content("cls"), f"{sample.where}: cls").strip()
        if not number.isdecimal():
            raise ValueError(f"{sample.where}: cls holds {number[:20]!r}; expected a class number")
        return self._class_captions(number, sample.where)

    def _class_captions(self, number: str, where: str) -> tuple[str, ...]:
        names = self.layout.class_names
        if names is None:
            raise ValueError(
                f"{where}: a class number without a name; "
                "add --class-names, and --class-template for captions"
            )
        if number not in names:
            raise ValueError(f"{where}: class {number} has no name in --class-names")
        return class_captions(number, self.layout) or (number,)


@dataclass(frozen=True)
class TarSample:
    """The members of one sample in an open tar."""

    file: tars.TarReader
    path: Path
    group: tars.Group

    @property
    def where(self) -> str:
        return f"{self.path}: sample {self.group.key}"

    def content(self, extension: str) -> bytes:
        return tars.read_content(self.file, self.group.members[extension], self.path)

    def json(self) -> dict:
        return parse_object(self.content("json"), f"{self.where}: the json member")

    def picture(self) -> tars.Member:
        """Its only picture, which is read later."""
        kinds = picture_kinds(self.group.members)
        if len(kinds) != 1:
            raise ValueError(
                f"{self.where}: expected one of {', '.join(PICTURES)}, found {', '.join(self.group.members)}"
            )
        picture = self.group.members[kinds[0]]
        if picture.size > EXTENSIONS["jpg"]:
            raise ValueError(
                f"{self.where}: the picture has {picture.size} bytes, "
                f"more than the {EXTENSIONS['jpg']} allowed"
            )
        return picture

    def check_sizes(self, extensions: tuple[str, ...]) -> None:
        for extension in extensions:
            member = self.group.members.get(extension)
            if member is not None and member.size > EXTENSIONS["json"]:
                raise ValueError(
                    f"{self.where}: .{extension} has {member.size} bytes, more than {EXTENSIONS['json']}"
                )


def picture_kinds(members: Iterable[str]) -> list[str]:
    """The extensions of a sample's pictures."""
    kinds = [extension for extension in members if extension in PICTURES]
    return [extension for extension in kinds if extension in COMMON] or kinds


def _compression(path: Path) -> str | None:
    """How a tar is compressed, by its first bytes, or by its name where they do not
    show it.
    """
    with tars.TarReader(path) as file:
        found = tars.compression(file.pread(8, 0))
    name = path.name.lower()
    return found or (name.rpartition(".")[2] if name.endswith(storage.REFUSED_TARS) else None)


def _read(path: Path, member: tars.Member, stamp: str, packed: str | None) -> bytes:
    """Content of a member. packed: how the tar is compressed."""
    if storage.is_local(path) and storage.stamp(path) != stamp:
        raise ValueError(f"{path}: it changed while it was read")
    with tars.TarReader(path, packed and unpacked(path, stamp, packed)) as file:
        return tars.read_content(file, member, path)


SOURCE = Source(
    "--tars",
    "a folder of WebDataset tars, or one tar, also compressed: captions in .txt or .json members, "
    "classes in .cls",
    read,
    uses=(),
    has_classes=True,
)
