"""The order of samples in training, computed from seed and position only.

It is the same for any number of ranks and workers. A global batch has B rows. The
shards of an epoch are permuted and concatenated. This line of N samples is cut into B
equal lanes, and the t-th batch of the epoch takes the t-th sample of every lane. So
each row of the batch reads one lane in order, shard after shard, and only the worker
with that row reads the lane. Reading is sequential, and no sample is read twice, for
any division of rows among workers. Within a lane, blocks of a few samples are permuted.

A position counts samples over all epochs: batch i holds positions i * B to
(i + 1) * B - 1. An epoch may end inside a batch. To resume, a run needs only the number
of finished batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

# Separate the random streams that share a seed.
SHARDS, BLOCKS = 0, 1


class Location(NamedTuple):
    """One sample.

    shard: its number in the manifest. sample: its number in the shard.
    """

    shard: int
    sample: int


class Block(NamedTuple):
    """Consecutive samples of a lane, which are read together and come out permuted."""

    epoch: int
    lane: int
    number: int


class _Epoch(NamedTuple):
    shards: np.ndarray  # [S] int64, in the order of the epoch
    ends: np.ndarray  # [S] int64, where each ends on the line


class Order:
    """The order of one shard set.

    Args:
        num_samples: Of each shard.
        rows: B.
        seed: Of the permutations.
        shuffle: About how many samples the blocks of all rows hold together.

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
        """The block of a position, and the position's index in the block's output
        order.
        """
        epoch, offset = divmod(position, self.total)
        turn, lane = divmod(offset, self.rows)
        number, index = divmod(turn, self.block_size)
        return Block(epoch, lane, number), index

    def locations(self, block: Block) -> list[Location]:
        """The samples of a block in the order of reading: along each shard.

        The list is empty past the end of the lane.
        """
        start, stop = self._bounds(block)
        if start >= stop:
            return []
        shards, ends = self._epoch(block.epoch)
        line = np.arange(start, stop)
        numbers = np.searchsorted(ends, line, side="right")
        samples = line - ends[numbers] + self.num_samples[shards[numbers]]
        return [Location(*pair) for pair in zip(shards[numbers].tolist(), samples.tolist(), strict=True)]

    def output_order(self, block: Block) -> np.ndarray:
        """[n] int64: which of `locations` comes out first, second, ..."""
        start, stop = self._bounds(block)
        if stop - start < 2:
            return np.zeros(stop - start, np.int64)
        return np.random.default_rng([BLOCKS, self.seed, *block]).permutation(stop - start)

    def _bounds(self, block: Block) -> tuple[int, int]:
        """Start and stop of a block on the line of its epoch."""
        length, num_longer = divmod(self.total, self.rows)  # the first lanes are one sample longer
        first = block.lane * length + min(block.lane, num_longer)
        end = first + length + (block.lane < num_longer)
        start = first + block.number * self.block_size
        return start, min(start + self.block_size, end)
