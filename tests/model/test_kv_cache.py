"""The key-value cache: it is allocated once, and returns views."""

import pytest
import torch

from mmtensorar.model.kv_cache import KVCache, LayerCache


def test_a_cache_keeps_what_was_appended_in_one_place():
    """`append` returns views of memory that is allocated once."""
    cache, parts = LayerCache(5), [torch.randn(2, 2, 3, size, 4) for size in (3, 1, 1)]
    returned = [cache.append(*part) for part in parts]
    for index, expected in enumerate(torch.cat(parts, dim=3)):
        assert torch.equal(returned[-1][index], expected)
    assert len({keys.data_ptr() for keys, _ in returned}) == 1 and cache.length == 5
    with pytest.raises(AssertionError, match="asked for 6"):
        cache.append(*parts[1])


def test_cropped_positions_are_overwritten():
    """Lookahead decoding drops its wrong guesses, and then appends the right ones."""
    cache = KVCache(2, 4)
    for layer in cache.layers:
        layer.append(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))
        layer.crop(1)
        keys, values = layer.append(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
        assert keys[0, 0, :, 0].tolist() == values[0, 0, :, 1].tolist() == [0, 1, 1]
    assert cache.length == 3
