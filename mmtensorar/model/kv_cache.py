"""The key-value cache of the backbones in our own code.

Shapes: B batch, G key/value heads, S new positions, C width of a head.
"""

from __future__ import annotations

from torch import Tensor


class LayerCache:
    """Keys and values of one layer, [B, G, max_len, C] each.

    The first `length` positions are filled.

    The memory is allocated once, at the first append, and `append` returns views of it.
    A cache that grows by concatenation copies all earlier positions at every step.
    """

    def __init__(self, max_len: int):
        self.max_len, self.length = max_len, 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add S positions, [B, G, S, C] each; return all keys and values so far,
        [B, G, length, C] each.
        """
        if self._keys is None or self._values is None:
            B, G, _, C = key.shape
            # The key's dtype, which under autocast is not that of the weights.
            self._keys, self._values = key.new_empty(2, B, G, self.max_len, C)
        start, self.length = self.length, self.length + key.shape[2]
        assert self.length <= self.max_len, f"a cache of {self.max_len} positions was asked for {self.length}"
        self._keys[:, :, start : self.length] = key
        self._values[:, :, start : self.length] = value
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def crop(self, length: int) -> None:
        """Forget all positions from `length` on."""
        self.length = min(self.length, length)


class KVCache:
    """The caches of all layers of a backbone, for up to max_len positions."""

    def __init__(self, num_layers: int, max_len: int):
        self.layers = [LayerCache(max_len) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """The number of positions that are filled; the same in all layers between two
        forward passes.
        """
        return self.layers[0].length
