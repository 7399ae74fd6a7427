"""Making a shard set in two stages, so that it can be interrupted anywhere and comes out the same on any number of workers.

First the items, in their order, are cut into parts of equal numbers, and each part becomes a tar and a record of what was
kept and what was left out, and why. Then, from the records alone, it is decided which samples go where: duplicates left out, a
validation split aside, shards of so many samples or bytes. A shard that is just one part is that part, renamed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools.samples import Unwanted, Wanted, make_sample
from data_tools.sources import Item
from data_tools.storage import fetched, written
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


class Kept(NamedTuple):
    """One sample of a part. number: of its item in the order of the set. num_bytes: in the tar. digest, picture: see Made."""

    number: int
    num_bytes: int
    digest: str
    picture: str


class LeftOut(NamedTuple):
    """name: of the item in its source."""

    number: int
    name: str
    reason: str


class Part(NamedTuple):
    """sha256: of the tar, None when nothing was kept. coded: whether the samples have codes already."""

    name: str
    sha256: str | None
    kept: tuple[Kept, ...]
    left_out: tuple[LeftOut, ...]
    coded: bool = False

    def write(self, folder: Path) -> None:
        write_text(folder / f"{self.name}.json", json.dumps(self))

    @classmethod
    def read(cls, folder: Path, name: str) -> Part | None:
        """None when the part is not finished: its record is written last."""
        path = folder / f"{name}.json"
        if not path.is_file():
            return None
        name, sha256, kept, left_out, coded = json.loads(path.read_bytes())
        return cls(
            name,
            sha256,
            tuple(Kept(*each) for each in kept),
            tuple(LeftOut(*each) for each in left_out),
            coded,
        )


def make_part(
    folder: Path, name: str, first: int, items: Sequence[Item], wanted: Wanted, skip_errors: bool
) -> Part:
    """Write one part. first: place of its first item in the whole set, from which the keys are counted.

    folder: on the disk, or a UPath. Raises ValueError naming the item that is damaged, unless they are left out.
    """
    digests: list[tuple[int, str, str]] = []
    left_out: list[LeftOut] = []

    def samples() -> Iterator[Sample]:
        for number, item in enumerate(items, first):
            try:
                made = make_sample(f"{number:09d}", item, wanted)
            except Unwanted as reason:
                left_out.append(LeftOut(number, item.key, str(reason)))
            except (ValueError, MemoryError) as error:
                reason = (
                    str(error) if isinstance(error, ValueError) else f"{item.key}: more than fits into memory"
                )
                if not skip_errors:
                    raise ValueError(reason) from error
                left_out.append(LeftOut(number, item.key, f"error: {reason}"))
            else:
                digests.append((number, made.digest, made.picture))
                yield made.sample

    remaining = samples()
    digest, kept = None, ()
    if (begin := next(remaining, None)) is not None:
        with written(folder / f"{name}.tar") as path:
            digest = write_tar(path, chain([begin], remaining)).sha256
            sizes = np.diff(sample_starts(path)).tolist()
        kept = tuple(Kept(number, size, *each) for (number, *each), size in zip(digests, sizes, strict=True))
    part = Part(name, digest, kept, tuple(left_out))
    part.write(folder)
    return part


def add_codes(
    folder: Path, part: Part, encoded: Callable[[Iterable[Sample], Path], Iterator[Sample]]
) -> Part:
    """The part with codes in every sample. encoded: samples and the path of their tar -> samples with codes."""
    if part.kept:
        path = folder / f"{part.name}.tar"
        with fetched(path) as without, written(path) as target:
            digest = write_tar(target, encoded(iterate_tar(without), path)).sha256
            sizes = np.diff(sample_starts(target)).tolist()
        kept = tuple(each._replace(num_bytes=size) for each, size in zip(part.kept, sizes, strict=True))
        part = part._replace(sha256=digest, kept=kept)
    part = part._replace(coded=True)
    part.write(folder)
    return part


# ---- from parts to shards --------------------------------------------------------------------


class Piece(NamedTuple):
    """Some samples of a part, by their places in it. whole: all of them."""

    part: str
    places: tuple[int, ...]
    whole: bool


def distribute(
    parts: Iterable[Part], takes: Callable[[int], bool], *, max_samples: int, max_bytes: int = 0
) -> Iterator[list[Piece]]:
    """What each shard is made of: samples in order, as many as go into max_samples, and max_bytes unless it is 0.

    takes: whether the sample of a number belongs here. A sample larger than max_bytes has a shard of its own.
    """
    shard: list[Piece] = []
    samples = size = 0
    for part in parts:
        places: list[int] = []
        for place, kept in enumerate(part.kept):
            if not takes(kept.number):
                continue
            if samples and (samples == max_samples or (max_bytes and size + kept.num_bytes > max_bytes)):
                shard += _piece(part, places)
                yield shard
                shard, places, samples, size = [], [], 0, 0
            places.append(place)
            samples, size = samples + 1, size + kept.num_bytes
        shard += _piece(part, places)
    if shard:
        yield shard


def _piece(part: Part, places: list[int]) -> list[Piece]:
    return [Piece(part.name, tuple(places), len(places) == len(part.kept))] if places else []


def make_shard(parts: Path, path: Path, pieces: Sequence[Piece]) -> Shard:
    """Write a shard from pieces of the parts in a folder; a part that is the whole shard is moved."""
    if len(pieces) == 1 and pieces[0].whole:
        part = Part.read(parts, pieces[0].part)
        if not path.is_file():  # or it was moved by a run that ended before it could say so
            move(parts / f"{part.name}.tar", path)
        return Shard(name=path.name, num_samples=len(part.kept), sha256=part.sha256)

    def samples() -> Iterator[Sample]:
        for piece in pieces:
            with fetched(parts / f"{piece.part}.tar") as tar:
                yield from read_samples(tar, sample_starts(tar), piece.places, EXTENSIONS)

    with written(path) as local:
        return write_tar(local, samples())
