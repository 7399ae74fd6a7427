"""One or several shard sets as one stream of samples.

Each set owns fixed rows of the global batch, as many as its weight gives it, spread
evenly over the batch. Within its rows a set has its own order (sample_order.py) and its
own epochs, so the sample at a position is still computed from seed and position only.

A row of the batch reads one lane of its set. When a sample cannot be read, the next
good one of the lane may replace it. Which one that is depends on the position and the
data alone.
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
    Codes,
    Manifest,
    Sample,
    Shard,
    TextFeatures,
    intact_starts,
    read_sample,
    wrong_count,
)
from mmtensorar.data.url_cache import Cache, Unreachable, is_url, shown
from mmtensorar.recipe import Data

# ---- what the recipe names -------------------------------------------------------------------


def shard_cache(data: Data) -> Cache:
    """The cache for shards of sets at a URL."""
    return Cache(data.cache, int(data.cache_gb * 1e9))


def read_manifest(folder: str, cache: Cache) -> Manifest:
    """The manifest of a folder or a URL. Raises ValueError like Manifest.read."""
    return cache.manifest(folder) if is_url(folder) else Manifest.read(folder)


def read_manifests(data: Data) -> dict[str, Manifest]:
    """Folder -> manifest of each training set.

    Raises ValueError when a set has no codes.
    """
    cache = shard_cache(data)
    manifests = {folder: read_manifest(folder, cache) for folder in data.weights}
    for folder, manifest in manifests.items():
        codes_of(manifest, folder)
    return manifests


def codes_of(manifest: Manifest, folder: str) -> Codes:
    """A set's entry about codes. Raises ValueError when it has none."""
    if manifest.codes is None:
        raise ValueError(f"{folder} has no image codes; run mmtensorar shards encode-codes on it")
    return manifest.codes


def text_features_of(manifest: Manifest, folder: str) -> TextFeatures:
    """A set's entry about text features. Raises ValueError when it has none."""
    if manifest.text_features is None:
        raise ValueError(
            f"data.text_features is cached, but {folder} has no text features; "
            "run mmtensorar shards encode-text on it"
        )
    return manifest.text_features


def apportion_rows(weights: Mapping[str, float], num_rows: int) -> dict[str, int]:
    """How many of a batch's rows each set owns.

    They are proportional to the weights; the largest remainders are rounded up. Raises
    ValueError when a set would get no row.
    """
    total = sum(weights.values())
    exact = {name: num_rows * weight / total for name, weight in weights.items()}
    rows = {name: int(share) for name, share in exact.items()}
    for name in sorted(exact, key=lambda name: rows[name] - exact[name])[: num_rows - sum(rows.values())]:
        rows[name] += 1
    for name, num in rows.items():
        if not num:
            raise ValueError(
                f"data.shards: {name} has weight {weights[name]:g} of {total:g}, less than one row of "
                f"data.batch_size {num_rows}; raise the weight, or use a larger batch"
            )
    return rows


def spread_rows(rows_per_set: Sequence[int]) -> list[tuple[int, int]]:
    """For each row of the batch: the number of its set, and the row's number within the
    set.
    """
    ranked = [
        ((row + 0.5) / num_rows, number, row)
        for number, num_rows in enumerate(rows_per_set)
        for row in range(num_rows)
    ]
    return [(number, row) for _, number, row in sorted(ranked)]


# ---- one set ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardSet:
    """One shard set of a mixture.

    folder: or its URL. rows: of the global batch, that it owns.
    """

    folder: str
    manifest: Manifest
    rows: int
    order: Order
    cache: Cache

    def shard_name(self, shard: Shard) -> str:
        """Path or URL of a shard, for messages."""
        if is_url(self.folder):
            return shown(f"{self.folder.rstrip('/')}/{shard.name}")
        return str(Path(self.folder) / shard.name)

    @contextmanager
    def local_path(self, shard: Shard) -> Iterator[Path]:
        """The path of a shard on this machine; one at a URL is downloaded first."""
        if is_url(self.folder):
            with self.cache.local_path(self.folder, shard) as path:
                yield path
        else:
            yield Path(self.folder) / shard.name


def shard_sets(
    sets: Sequence[tuple[str, Manifest, int]], *, seed: int, shuffle: int, cache: Cache
) -> tuple[ShardSet, ...]:
    """The sets with their orders.

    Args:
        sets: Folder, manifest and rows of each.
        seed: Of the orders.
        shuffle: About how many samples the blocks of all rows hold together.
        cache: For sets at a URL.
    """
    batch_size = sum(rows for _, _, rows in sets)
    ordered = []
    for number, (folder, manifest, rows) in enumerate(sets):
        counts = [shard.num_samples for shard in manifest.shards]
        # Each set has its own seed, so that two sets of equal shards get different
        # orders.
        order = Order(counts, rows=rows, seed=seed + (number << 32), shuffle=shuffle * rows // batch_size)
        ordered.append(ShardSet(folder, manifest, rows, order, cache))
    return tuple(ordered)


# ---- reading ---------------------------------------------------------------------------------


class StoredSample(NamedTuple):
    """A sample as it is in its shard. where: shard and key, for messages."""

    where: str
    shard_set: ShardSet
    sample: Sample


@dataclass
class LaneReader:
    """Reads the sample at a position, and those that may replace it.

    It holds one block of each row's lane, and the offsets of the samples in recent
    shards.

    extensions: the members that are read. max_shards: shards whose offsets are kept.
    retry_s: seconds before an unreachable shard is tried again.
    """

    sets: tuple[ShardSet, ...]
    extensions: tuple[str, ...]
    max_shards: int
    retry_s: float = 600.0
    _blocks: dict[int, tuple[Block, list[StoredSample | ValueError]]] = field(default_factory=dict)
    _unreachable: dict[tuple[str, str], tuple[float, Unreachable]] = field(default_factory=dict)
    _starts: dict[tuple[str, str], tuple[np.ndarray, ValueError | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.owners = spread_rows([shard_set.rows for shard_set in self.sets])

    def candidates(self, position: int) -> Iterator[StoredSample | ValueError]:
        """The position's sample, or the error of reading it; then its replacements in
        order.

        Replacements are the other samples of the block (which are in memory already),
        then the rest of the lane, then the other lanes of the set.
        """
        step, row = divmod(position, len(self.owners))
        number, row_of_set = self.owners[row]
        shard_set = self.sets[number]
        block, index = shard_set.order.block(step * shard_set.rows + row_of_set)
        cached = self._blocks.get(row)
        if cached is None or cached[0] != block:
            cached = self._blocks[row] = block, self._read_block(shard_set, block)
        yield from cached[1][index:]
        yield from cached[1][:index]
        for lane in range(block.lane, block.lane + shard_set.rows):
            for later in count(block.number + 1 if lane == block.lane else 0):
                samples = self._read_block(
                    shard_set, block._replace(lane=lane % shard_set.rows, number=later)
                )
                if not samples:
                    break
                yield from samples

    def _read_block(self, shard_set: ShardSet, block: Block) -> list[StoredSample | ValueError]:
        """The samples of a block in output order."""
        locations = shard_set.order.locations(block)
        samples: list[StoredSample | ValueError] = []
        for number in dict.fromkeys(location.shard for location in locations):
            shard = shard_set.manifest.shards[number]
            numbers = [location.sample for location in locations if location.shard == number]
            samples += self._read_shard(shard_set, shard, numbers)
        return [samples[index] for index in shard_set.order.output_order(block)] if locations else []

    def _read_shard(
        self, shard_set: ShardSet, shard: Shard, numbers: list[int]
    ) -> list[StoredSample | ValueError]:
        key = (shard_set.folder, shard.name)
        tried, error = self._unreachable.get(key, (0.0, None))
        if error is not None and time.monotonic() - tried < self.retry_s:
            return [error] * len(numbers)
        try:
            with shard_set.local_path(shard) as path, tars.TarReader(path) as file:
                starts, damage = self._find_starts(shard_set, shard, path)
                num_intact = min(len(starts) - 1, shard.num_samples)
                if damage is not None and len(starts) - 1 > shard.num_samples:
                    num_intact = 0  # it is another shard: the manifest describes none of its samples
                return [
                    damage
                    if damage is not None and number >= num_intact
                    else self._read_one(shard_set, shard, file, path, *starts[number : number + 2])
                    for number in numbers
                ]
        except Unreachable as error:
            # Trying again for each of its samples would take hours.
            self._unreachable[key] = time.monotonic(), error
            return [error] * len(numbers)
        except tars.Damage as error:
            return [error] * len(numbers)

    def _read_one(
        self, shard_set: ShardSet, shard: Shard, file: tars.TarReader, path: Path, start: int, stop: int
    ) -> StoredSample | ValueError:
        try:
            sample = read_sample(file, path, int(start), int(stop), self.extensions)
        except (ValueError, OSError) as error:
            return ValueError(str(error).replace(str(path), shard_set.shard_name(shard)))
        return StoredSample(f"{shard_set.shard_name(shard)}: sample {sample.key}", shard_set, sample)

    def _find_starts(
        self, shard_set: ShardSet, shard: Shard, path: Path
    ) -> tuple[np.ndarray, ValueError | None]:
        """Offsets of the intact samples; and an error if their number is not the
        manifest's.
        """
        key = (shard_set.folder, shard.name)
        if key not in self._starts:
            starts, damage = intact_starts(path)
            name, num_samples = shard_set.shard_name(shard), len(starts) - 1
            if damage is not None:
                damage = ValueError(str(damage).replace(str(path), name))
            elif num_samples != shard.num_samples:
                damage = ValueError(wrong_count(name, num_samples, shard))
            self._starts[key] = starts, damage
            while len(self._starts) > self.max_shards:
                self._starts.pop(next(iter(self._starts)))  # the oldest: lanes leave shards behind
        return self._starts[key]
