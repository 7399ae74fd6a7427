"""The key-value cache: rows at different places, in memory that is allocated once."""

import pytest
import torch

from mmtensorar.model.kv_cache import KVCache

CPU = torch.device("cpu")


def test_a_cache_keeps_what_was_appended_in_one_place():
    """`append` returns views of memory that is allocated once."""
    cache, parts = KVCache(1, 5), [torch.randn(2, 2, 3, size, 4) for size in (3, 1, 1)]
    returned = []
    for part in parts:
        cache.begin(2, part.shape[3], CPU)
        returned.append(cache.layers[0].append(*part))
    for index, expected in enumerate(torch.cat(parts, dim=3)):
        assert torch.equal(returned[-1][index], expected)
    assert len({keys.data_ptr() for keys, _ in returned}) == 1 and cache.longest == 5
    with pytest.raises(AssertionError, match="asked for 6"):
        cache.begin(2, 1, CPU)


def test_rows_at_different_places_are_written_and_seen_each_at_its_own():
    """After a rewind, wrong guesses are overwritten, and no row sees beyond its own
    positions.
    """
    cache = KVCache(2, 6)
    cache.begin(2, 4, CPU)
    for layer in cache.layers:
        layer.append(torch.zeros(2, 1, 4, 2), torch.zeros(2, 1, 4, 2))
    cache.rewind(torch.tensor([1, 3]), 3, level=False)
    step = cache.begin(2, 2, CPU)
    keys, values = cache.layers[1].append(torch.ones(2, 1, 2, 2), torch.ones(2, 1, 2, 2))
    assert keys[:, 0, :, 0].tolist() == values[:, 0, :, 1].tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]
    assert step.places_RS.tolist() == [[1, 2], [3, 4]] and step.used == 5
    assert step.pattern.visible.sum(-1)[:, 0].tolist() == [[2, 3], [4, 5]]


def test_padding_is_never_seen_and_does_not_count_as_a_position():
    cache = KVCache(1, 5)
    cache.begin(2, 3, CPU, torch.tensor([[False, False, True], [True, True, True]]))
    assert cache.positions_RS.tolist() == [[0, 0, 0], [0, 1, 2]]
    step = cache.begin(2, 1, CPU)
    assert cache.positions_RS.tolist() == [[1], [3]]
    assert step.pattern.visible[:, 0, 0].tolist() == [[False, False, True, True], [True] * 4]


def test_rows_that_are_kept_take_their_contents_along():
    """Row 0 is finished, and the last row takes its place, with places and padding."""
    cache = KVCache(1, 4)
    cache.begin(3, 2, CPU, torch.tensor([[True, True], [True, True], [False, True]]))
    numbers = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    cache.layers[0].append(numbers, numbers)
    cache.rewind(torch.tensor([2, 1, 2]), 2, level=False)
    cache.keep_rows([2, 1])
    step = cache.begin(2, 1, CPU)
    keys, _ = cache.layers[0].append(torch.full((2, 1, 1, 2), 9.0), torch.zeros(2, 1, 1, 2))
    assert keys[:, 0, :, 0].tolist() == [[2, 2, 9], [1, 9, 0]]
    assert step.places_RS.tolist() == [[2], [1]] and cache.positions_RS.tolist() == [[1], [1]]
