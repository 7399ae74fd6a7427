"""The order of samples in training: pure arithmetic on (seed, position), the same for any number of ranks and readers.

A global batch has B rows. The shards of an epoch are permuted and laid end to end; that line of N samples is cut into B
equal lanes, and the t-th batch of the epoch takes the t-th sample of every lane. So a row of the batch reads one lane, from
one shard to the next, in order, and whoever has that row reads nothing else: reading is sequential and no sample is read
twice, however the rows are shared out. Within a lane, blocks of a few samples are permuted.

Positions count samples over all epochs: batch i holds positions i * B to (i + 1) * B - 1. An epoch need not end with a
batch. To go on after any number of batches, nothing need be known but that number.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

# Separate the random streams that share a seed.
SHARDS, BLOCKS = 0, 1


class Place(NamedTuple):
    """Where a position is: shard by its number in the manifest, sample by its number in the shard."""

    shard: int
    sample: int


class Block(NamedTuple):
    """A run of places of a lane, as they are read, and the order in which they are given out."""

    epoch: int
    lane: int
    number: int


class _Epoch(NamedTuple):
    shards: np.ndarray  # [S] int64, in the order of the epoch
    ends: np.ndarray  # [S] int64, where each ends on the line


class Order:
    """num_samples: of each shard. rows: B. shuffle: samples that the blocks of all rows hold together, about.

    Raises ValueError when there is no sample, or no row.
    """

    def __init__(self, num_samples: Sequence[int], *, rows: int, seed: int, shuffle: int):
        self.num_samples = np.asarray(num_samples, np.int64)
        self.rows, self.seed = rows, seed
        self.total = int(self.num_samples.sum())  # N
        if self.total < 1 or rows < 1:
            raise ValueError(f"{self.total} samples and {rows} rows; expected at least one of each")
        self.block_size = max(1, shuffle // rows)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> _Epoch:
        shards = np.random.default_rng([SHARDS, self.seed, epoch]).permutation(len(self.num_samples))
        return _Epoch(shards, np.cumsum(self.num_samples[shards]))

    def block(self, position: int) -> tuple[Block, int]:
        """The block that a position is in, and which of its samples it is, by the order of giving out."""
        epoch, offset = divmod(position, self.total)
        turn, lane = divmod(offset, self.rows)
        number, index = divmod(turn, self.block_size)
        return Block(epoch, lane, number), index

    def places(self, block: Block) -> list[Place]:
        """The places of a block in the order of reading: along each shard. None past the end of the lane."""
        start, stop = self._bounds(block)
        if start >= stop:
            return []
        shards, ends = self._epoch(block.epoch)
        where = np.arange(start, stop)
        numbers = np.searchsorted(ends, where, side="right")
        samples = where - ends[numbers] + self.num_samples[shards[numbers]]
        return [Place(*pair) for pair in zip(shards[numbers].tolist(), samples.tolist(), strict=True)]

    def given_out(self, block: Block) -> np.ndarray:
        """[n] int64: which of `places` comes first, second, ..."""
        start, stop = self._bounds(block)
        if stop - start < 2:
            return np.zeros(stop - start, np.int64)
        return np.random.default_rng([BLOCKS, self.seed, *block]).permutation(stop - start)

    def place(self, position: int) -> Place:
        """Of one position alone."""
        block, index = self.block(position)
        return self.places(block)[self.given_out(block)[index]]

    def _bounds(self, block: Block) -> tuple[int, int]:
        """Start and stop of a block on the line of its epoch."""
        length, longer = divmod(self.total, self.rows)  # the first lanes are one sample longer
        first = block.lane * length + min(block.lane, longer)
        end = first + length + (block.lane < longer)
        start = first + block.number * self.block_size
        return start, min(start + self.block_size, end)
