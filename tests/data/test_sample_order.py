"""The order of samples depends only on seed and position: each sample comes once per
epoch, and blocks are bounded.
"""

import time
import tracemalloc

import numpy as np
import pytest

from mmtensorar.data.loader import worker_rows
from mmtensorar.data.sample_order import Block, Location, Order
from tests.helpers.orders import location

CASES = [
    ([5], 1, 0),
    ([5, 7, 6, 4], 4, 8),
    ([1] * 30, 7, 0),
    ([100, 1, 1], 8, 64),
    ([3, 2], 8, 16),
    ([1], 3, 1000),
]


@pytest.mark.parametrize(("counts", "rows", "shuffle"), CASES)
def test_every_epoch_holds_every_sample_once(counts, rows, shuffle):
    order = Order(counts, rows=rows, seed=1, shuffle=shuffle)
    whole = {Location(shard, sample) for shard, count in enumerate(counts) for sample in range(count)}
    for epoch in range(3):
        found = [
            location(order, position) for position in range(epoch * order.total, (epoch + 1) * order.total)
        ]
        assert len(found) == len(whole) and set(found) == whole


@pytest.mark.parametrize(("counts", "rows", "shuffle"), CASES)
def test_a_block_is_read_shard_by_shard(counts, rows, shuffle):
    """Reading is sequential: each shard of a block comes once, with rising samples, and
    the next block starts where it ended.
    """
    order = Order(counts, rows=rows, seed=1, shuffle=shuffle)
    lanes: dict[int, list[Location]] = {}
    for position in range(order.total):
        block, index = order.block(position)
        assert 0 <= index < len(order.locations(block)) <= max(1, shuffle // rows)
        if index == 0:
            lanes.setdefault(block.lane, []).extend(order.locations(block))
    for places in lanes.values():
        for before, after in zip(places, places[1:], strict=False):
            assert (after.shard == before.shard and after.sample == before.sample + 1) or (
                before.sample == counts[before.shard] - 1 and after.sample == 0
            )
        shards = [place.shard for place in places]
        assert len(set(shards)) == 1 + sum(a != b for a, b in zip(shards, shards[1:], strict=False))


def test_seed_and_epoch_change_the_order():
    counts = [10] * 10
    orders = [
        [location(Order(counts, rows=5, seed=seed, shuffle=50), p) for p in range(200)] for seed in (1, 2)
    ]
    assert orders[0] != orders[1] and orders[0][:100] != orders[0][100:]
    assert orders[0] == [location(Order(counts, rows=5, seed=1, shuffle=50), p) for p in range(200)]


def test_a_block_is_permuted():
    order = Order([1000], rows=1, seed=0, shuffle=100)
    given = order.output_order(Block(0, 0, 3))
    assert sorted(given) == list(range(100)) and list(given) != list(range(100))


def test_an_order_of_no_samples_is_refused():
    for counts, rows in (([], 1), ([0], 1), ([1], 0)):
        with pytest.raises(ValueError, match="expected at least one of each"):
            Order(counts, rows=rows, seed=0, shuffle=0)


def test_a_job_of_1024_ranks_and_8_readers_each():
    """100,000 shards.

    Every reader has rows, the readers together read each sample once per epoch, and
    planning takes little time.
    """
    tracemalloc.start()
    began = time.process_time()
    counts = np.random.default_rng(0).integers(900, 1100, 100_000)
    batch_size = 2 * 1024 * 8
    order = Order(counts, rows=batch_size, seed=0, shuffle=100_000)
    rows = np.zeros(batch_size, int)
    for rank in range(1024):
        readers = worker_rows(batch_size, 1, rank, 1024, 8)
        assert len(readers) == 8
        for ((first, stop),) in readers:
            assert stop - first == 2
            rows[first:stop] += 1
    assert (rows == 1).all()
    # Lanes are cut from one line without a gap, and their lengths differ by at most one
    # sample, so no reader runs out before the others.
    bounds = np.array([order._bounds(Block(0, lane, 0))[0] for lane in range(batch_size)] + [order.total])
    lengths = np.diff(bounds)
    assert bounds[0] == 0 and lengths.sum() == counts.sum() and lengths.max() - lengths.min() <= 1
    some = [
        location(order, position) for position in np.random.default_rng(1).integers(0, 3 * order.total, 200)
    ]
    assert all(0 <= place.sample < counts[place.shard] for place in some)
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"{time.process_time() - began:.1f} s, {memory / 2**20:.0f} MiB")
    assert memory < 500 * 2**20
