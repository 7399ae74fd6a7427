"""A shard set is made in two stages, so that work can be interrupted at any time.

First the items, in their order, are cut into parts with equal numbers of items. Each
part becomes a tar, and a record of what was kept, and of what was left out and why.
Then the records alone decide which shard gets which samples: duplicates are left out,
and a validation split is set aside. A shard that is exactly one part is that part,
renamed. The result is the same for any number of workers.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools.samples import FilteredOut, SampleSettings, make_sample
from data_tools.sources import Item
from data_tools.storage import local_copy, local_target
from mmtensorar.data.shards import (
    EXTENSIONS,
    Sample,
    Shard,
    iterate_tar,
    read_samples,
    sample_starts,
    write_tar,
)
from mmtensorar.files import move, write_text

# Why a sample is left out begins with one of these, or is the sentence of a filter.
DUPLICATE = "duplicate of "  # and the name of the first one
ERROR = "error: "  # and what is wrong, with file and row


@dataclass(frozen=True)
class SetSettings:
    """How samples are put into sets. bytes_per_shard: 0 counts samples instead.

    validation_share: 0 makes no validation set. deduplicate: samples, pictures or
    False.
    on_error: raise or skip.
    """

    samples_per_shard: int
    bytes_per_shard: int
    validation_share: float
    deduplicate: str | bool
    on_error: str


class Kept(NamedTuple):
    """One sample of a part.

    number: of its item in the order of the set. num_bytes: in the tar. digest, picture:
    see MadeSample.
    """

    number: int
    num_bytes: int
    digest: str
    picture: str


class LeftOut(NamedTuple):
    """An item that is not in the set. name: the item's name in its source."""

    number: int
    name: str
    reason: str


class Part(NamedTuple):
    """The record of one part.

    sha256: of the tar; None when nothing was kept. coded: whether the samples already
    have their codes and text features.
    """

    name: str
    sha256: str | None
    kept: tuple[Kept, ...]
    left_out: tuple[LeftOut, ...]
    coded: bool = False

    @property
    def num_items(self) -> int:
        return len(self.kept) + len(self.left_out)

    def write(self, folder: Path) -> None:
        """Write the record into a folder."""
        write_text(folder / f"{self.name}.json", json.dumps(self))

    @classmethod
    def read(cls, folder: Path, name: str) -> Part | None:
        """The record of a name; None when the part is not finished: records are written
        last.
        """
        path = folder / f"{name}.json"
        if not path.is_file():
            return None
        name, sha256, kept, left_out, coded = json.loads(path.read_bytes())
        return cls(
            name,
            sha256,
            tuple(Kept(*fields) for fields in kept),
            tuple(LeftOut(*fields) for fields in left_out),
            coded,
        )


# ---- first stage -----------------------------------------------------------------------------


def make_part(
    folder: Path, name: str, first: int, items: Sequence[Item], settings: SampleSettings, skip_errors: bool
) -> Part:
    """Write one part.

    Args:
        folder: Folder of the parts, on disk or a UPath.
        name: Name of the part.
        first: Number of its first item in the set; keys are counted from it.
        items: Items of the part.
        settings: How samples are made.
        skip_errors: Leave damaged items out instead of raising ValueError, which names
            the item.
    """
    digests: list[tuple[int, str, str]] = []
    left_out: list[LeftOut] = []

    def samples() -> Iterator[Sample]:
        for number, item in enumerate(items, first):
            try:
                made = make_sample(f"{number:09d}", item, settings)
            except FilteredOut as reason:
                left_out.append(LeftOut(number, item.key, str(reason)))
            except (ValueError, MemoryError) as error:
                reason = (
                    str(error) if isinstance(error, ValueError) else f"{item.key}: more than fits into memory"
                )
                if not skip_errors:
                    raise ValueError(reason) from error
                left_out.append(LeftOut(number, item.key, ERROR + reason))
            else:
                digests.append((number, made.digest, made.picture))
                yield made.sample

    remaining = samples()
    digest, kept = None, ()
    if (begin := next(remaining, None)) is not None:
        with local_target(folder / f"{name}.tar") as path:
            digest = write_tar(path, chain([begin], remaining)).sha256
            sizes = np.diff(sample_starts(path)).tolist()
        kept = tuple(Kept(number, size, *rest) for (number, *rest), size in zip(digests, sizes, strict=True))
    part = Part(name, digest, kept, tuple(left_out))
    part.write(folder)
    return part


def add_codes(folder: Path, part: Part, encode: Callable[[Iterable[Sample], Path], Iterator[Sample]]) -> Part:
    """Add codes or text features to every sample of a part.

    encode: (samples, path of their tar) -> samples with codes.
    """
    if part.kept:
        path = folder / f"{part.name}.tar"
        with local_copy(path) as without, local_target(path) as target:
            digest = write_tar(target, encode(iterate_tar(without), path)).sha256
            sizes = np.diff(sample_starts(target)).tolist()
        kept = tuple(sample._replace(num_bytes=size) for sample, size in zip(part.kept, sizes, strict=True))
        part = part._replace(sha256=digest, kept=kept)
    part = part._replace(coded=True)
    part.write(folder)
    return part


# ---- which samples are left out --------------------------------------------------------------


def find_duplicates(parts: Iterable[Part], items: Sequence[Item], *, pictures: bool) -> list[LeftOut]:
    """All but the first of samples with the same picture and caption.

    Args:
        parts: All parts of the set.
        items: Of the set, for their names.
        pictures: Samples with the same picture are duplicates, whatever their captions.
    """
    first: dict[str, int] = {}
    duplicates = []
    for part in parts:
        for kept in part.kept:
            number = first.setdefault(kept.picture if pictures else kept.digest, kept.number)
            if number != kept.number:
                reason = DUPLICATE + items[number].key
                duplicates.append(LeftOut(kept.number, items[kept.number].key, reason))
    return duplicates


def count_reasons(left_out: Iterable[LeftOut]) -> str:
    """How many items were left out for each kind of reason, in words."""

    def kind(reason: str) -> str:
        if reason.startswith(DUPLICATE):
            return "duplicate"
        if not reason.startswith(ERROR):
            return reason
        if re.search(": (no caption|the caption is empty)", reason):
            return "without a caption"
        return "damaged" if re.search("unreadable image|: damaged", reason) else "invalid"

    counts = Counter(kind(item.reason) for item in left_out)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def is_validation(picture: str, share: float) -> bool:
    """Whether a picture belongs to the validation split.

    This depends on the picture's hash alone: a picture with several captions, or under
    several names, is on one side only, and neither more samples nor another seed move a
    picture to the other side.
    """
    return int(picture[:16], 16) < share * 2**64


# ---- second stage ----------------------------------------------------------------------------


class Selection(NamedTuple):
    """Some samples of a part, by their indices in it.

    is_whole: whether these are all of them.
    """

    part: str
    indices: tuple[int, ...]
    is_whole: bool


def distribute(
    parts: Iterable[Part], takes: Callable[[int], bool], *, max_samples: int, max_bytes: int = 0
) -> Iterator[list[Selection]]:
    """The samples of each shard, in order, as many as fit.

    Args:
        parts: All parts of the set.
        takes: Whether the sample of a number belongs to this set.
        max_samples: Of a shard.
        max_bytes: Of a shard, 0 for no bound. A larger sample gets a shard of its own.
    """
    shard: list[Selection] = []
    samples = size = 0
    for part in parts:
        indices: list[int] = []
        for index, kept in enumerate(part.kept):
            if not takes(kept.number):
                continue
            if samples and (samples == max_samples or (max_bytes and size + kept.num_bytes > max_bytes)):
                shard += _select(part, indices)
                yield shard
                shard, indices, samples, size = [], [], 0, 0
            indices.append(index)
            samples, size = samples + 1, size + kept.num_bytes
        shard += _select(part, indices)
    if shard:
        yield shard


def _select(part: Part, indices: list[int]) -> list[Selection]:
    return [Selection(part.name, tuple(indices), len(indices) == len(part.kept))] if indices else []


def is_one_part(selections: Sequence[Selection]) -> bool:
    """Whether a shard is exactly one part."""
    return len(selections) == 1 and selections[0].is_whole


def make_shard(parts: Path, path: Path, selections: Sequence[Selection]) -> Shard:
    """Write a shard from samples of parts. A part that is the whole shard is moved.

    Args:
        parts: Folder of the parts.
        path: Of the shard.
        selections: Its samples.
    """
    if is_one_part(selections):
        part = Part.read(parts, selections[0].part)
        assert part is not None and part.sha256 is not None  # its record chose the samples
        if not path.is_file():  # a run that was killed before it recorded the shard may have moved it
            move(parts / f"{part.name}.tar", path)
        return Shard(name=path.name, num_samples=len(part.kept), sha256=part.sha256)

    def samples() -> Iterator[Sample]:
        for selection in selections:
            with local_copy(parts / f"{selection.part}.tar") as tar:
                yield from read_samples(tar, sample_starts(tar), selection.indices, EXTENSIONS)

    with local_target(path) as local:
        return write_tar(local, samples())
