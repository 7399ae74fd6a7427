"""One or several shard sets as one stream: which rows of a global batch belong to which set, and what is read for a position.

Each set owns fixed rows of the global batch, as many as its weight gives it, spread evenly over the batch. Within its rows a
set has an order of its own (order.py), with epochs of its own. So what a position holds is arithmetic still.

A row of the batch reads one lane of its set. A sample that cannot be read may be replaced by the next whole one of the lane:
which one that is depends on the position and the data alone, as everything here does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmtensorar.data import tars
from mmtensorar.data.sample_order import Block, Order
from mmtensorar.data.shards import (
    Manifest,
    Sample,
    Shard,
    read_sample,
    whole_starts,
)
from mmtensorar.data.url_cache import (
    Cache,
    Unreachable,
    is_url,
    shown,
)


def apportion(weights: Mapping[str, float], rows: int) -> dict[str, int]:
    """How many of a batch's rows each set owns: in proportion to the weights, largest remainder first.

    Raises ValueError when a set would get none.
    """
    total = sum(weights.values())
    exact = {name: rows * weight / total for name, weight in weights.items()}
    shares = {name: int(share) for name, share in exact.items()}
    for name in sorted(exact, key=lambda name: shares[name] - exact[name])[: rows - sum(shares.values())]:
        shares[name] += 1
    for name, share in shares.items():
        if not share:
            raise ValueError(
                f"data.shards: {name} has weight {weights[name]:g} of {total:g}, less than one row of data.batch_size {rows}; "
                "give it more, or take a larger batch"
            )
    return shares


def spread(shares: Sequence[int]) -> list[tuple[int, int]]:
    """For each row of the batch its set, and which of the set's rows it is."""
    places = [
        ((row + 0.5) / share, number, row) for number, share in enumerate(shares) for row in range(share)
    ]
    return [(number, row) for _, number, row in sorted(places)]


@dataclass(frozen=True)
class Source:
    """One shard set of a mixture. folder: or its URL. rows: of the global batch, that it owns."""

    folder: str
    manifest: Manifest
    rows: int
    order: Order
    cache: Cache

    def name(self, shard: Shard) -> str:
        """Where a shard is, for messages."""
        return (
            shown(f"{self.folder.rstrip('/')}/{shard.name}")
            if is_url(self.folder)
            else str(Path(self.folder) / shard.name)
        )

    @contextmanager
    def opened(self, shard: Shard) -> Iterator[Path]:
        """The path of a shard on this machine."""
        if is_url(self.folder):
            with self.cache.opened(self.folder, shard) as path:
                yield path
        else:
            yield Path(self.folder) / shard.name


def read_manifest(folder: str, cache: Cache) -> Manifest:
    """Of a folder or a URL. Raises ValueError like Manifest.read."""
    return cache.manifest(folder) if is_url(folder) else Manifest.read(folder)


def sources(
    sets: Sequence[tuple[str, Manifest, int]], *, seed: int, shuffle: int, cache: Cache
) -> tuple[Source, ...]:
    """sets: folder, manifest and rows of each. shuffle: samples that the blocks of all rows hold together, about."""
    batch_size = sum(rows for _, _, rows in sets)
    found = []
    for number, (folder, manifest, rows) in enumerate(sets):
        counts = [shard.num_samples for shard in manifest.shards]
        # Two sets of equal shards are not to go in step.
        order = Order(counts, rows=rows, seed=seed + (number << 32), shuffle=shuffle * rows // batch_size)
        found.append(Source(folder, manifest, rows, order, cache))
    return tuple(found)


class Row(NamedTuple):
    """One sample as it is in its shard. where: shard and key, for errors."""

    where: str
    source: Source
    sample: Sample


@dataclass
class Lanes:
    """What is read for a position. Of each row's lane it holds one block, and where the samples of its shards begin.

    extensions: the members that are read. max_starts: shards whose beginnings are kept. retry_s: before a shard that could not
    be had is asked for again.
    """

    sources: tuple[Source, ...]
    extensions: tuple[str, ...]
    max_starts: int
    retry_s: float = 600.0
    _blocks: dict[int, tuple[Block, list[Row | ValueError]]] = field(default_factory=dict)
    _missing: dict[tuple[str, str], tuple[float, Unreachable]] = field(default_factory=dict)
    _starts: dict[tuple[str, str], tuple[np.ndarray, ValueError | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.owners = spread([source.rows for source in self.sources])

    def rows(self, position: int) -> Iterator[Row | ValueError]:
        """The position's sample, or why it cannot be read; then those after it in the lane, and in the lanes after that."""
        step, row = divmod(position, len(self.owners))
        number, own = self.owners[row]
        source = self.sources[number]
        block, index = source.order.block(step * source.rows + own)
        held = self._blocks.get(row)
        if held is None or held[0] != block:
            held = self._blocks[row] = block, self._read(source, block)
        yield from held[1][index:]
        yield from held[1][:index]  # of the same block, so that in most cases nothing more is read
        for lane in range(block.lane, block.lane + source.rows):
            for later in count(block.number + 1 if lane == block.lane else 0):
                found = self._read(source, block._replace(lane=lane % source.rows, number=later))
                if not found:
                    break
                yield from found

    def _read(self, source: Source, block: Block) -> list[Row | ValueError]:
        """The samples of a block in the order of giving out."""
        places = source.order.places(block)
        found: list[Row | ValueError] = []
        for number in dict.fromkeys(place.shard for place in places):
            shard = source.manifest.shards[number]
            found += self._read_shard(
                source, shard, [place.sample for place in places if place.shard == number]
            )
        return [found[index] for index in source.order.given_out(block)] if places else []

    def _read_shard(self, source: Source, shard: Shard, numbers: list[int]) -> list[Row | ValueError]:
        key = (source.folder, shard.name)
        tried, missing = self._missing.get(key, (0.0, None))
        if missing is not None and time.monotonic() - tried < self.retry_s:
            return [missing] * len(numbers)
        try:
            with source.opened(shard) as path, tars.opened(path) as file:
                starts, damage = self._find_starts(source, shard, path)
                whole = min(len(starts) - 1, shard.num_samples)
                if damage is not None and len(starts) - 1 > shard.num_samples:
                    whole = 0  # it is another shard: none of its samples is what the manifest speaks of
                return [
                    damage
                    if number >= whole
                    else self._row(source, shard, file, path, *starts[number : number + 2])
                    for number in numbers
                ]
        except Unreachable as missing:
            # To ask again for each of its samples would take for ever.
            self._missing[key] = time.monotonic(), missing
            return [missing] * len(numbers)
        except tars.Damage as missing:
            return [missing] * len(numbers)

    def _row(
        self, source: Source, shard: Shard, file: tars.opened, path: Path, start: int, stop: int
    ) -> Row | ValueError:
        try:
            sample = read_sample(file, path, int(start), int(stop), self.extensions)
        except (ValueError, OSError) as error:
            return ValueError(str(error).replace(str(path), source.name(shard)))
        return Row(f"{source.name(shard)}: sample {sample.key}", source, sample)

    def _find_starts(self, source: Source, shard: Shard, path: Path) -> tuple[np.ndarray, ValueError | None]:
        """Where the whole samples begin, and why there are fewer than the manifest says, if there are."""
        key = (source.folder, shard.name)
        if key not in self._starts:
            starts, damage = whole_starts(path)
            name, found = source.name(shard), len(starts) - 1
            if damage is not None:
                damage = ValueError(str(damage).replace(str(path), name))
            elif found != shard.num_samples:
                damage = ValueError(
                    f"{name}: {found} samples, the manifest says {shard.num_samples}; make the shard again"
                )
            self._starts[key] = starts, damage
            while len(self._starts) > self.max_starts:
                self._starts.pop(next(iter(self._starts)))  # the longest known: lanes go from shard to shard
        return self._starts[key]
