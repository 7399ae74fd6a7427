"""The key-value cache: memory that is allocated once, and rows at different places.

In decoding, each picture goes on at its own pace, so the rows of a batch hold different
numbers of positions. A forward pass begins with `KVCache.begin`, which says where its
new positions go and which ones each of them sees; all layers use the answer.
Shapes: R rows, P prefix, S new positions, N positions in use, G key/value heads, C
width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmtensorar.model import attention
from mmtensorar.model.attention import Implementation, Pattern


class Pass(NamedTuple):
    """Where the new positions of a forward pass go, the same for all layers."""

    places_RS: Tensor  # int64: in the cache
    start: int | None  # the first of them where all rows have the same places, else None
    used: int  # N
    pattern: Pattern


class LayerCache:
    """Keys and values of one layer."""

    def __init__(self, cache: KVCache):
        self._cache = cache
        self._memory: Tensor | None = None  # [2, R, max_len, G, C]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the S new positions, [R, G, S, C] each; return all positions in use,
        [R, G, N, C] each.
        """
        R, G, S, C = key.shape
        if self._memory is None:
            # The key's dtype, which under autocast is not that of the weights. Zeros,
            # since a hidden position has weight 0, and 0 times NaN is NaN.
            self._memory = key.new_zeros(2, R, self._cache.max_len, G, C)
        now, memory = self._cache.now, self._memory[:, :R]
        for part, new in zip(memory, (key, value), strict=True):
            new = new.transpose(1, 2)  # [R, S, G, C]
            if now.start is not None:
                part[:, now.start : now.start + S] = new
            else:
                part.flatten(0, 1).index_copy_(0, self._cache.flat_places, new.flatten(0, 1))
        keys, values = memory[:, :, : now.used].transpose(2, 3)
        return keys, values

    def mark_static(self) -> None:
        """Tell the compiler that the memory stays where it is, so that a CUDA graph may
        write to it.
        """
        torch._dynamo.mark_static_address(self._memory)

    def move(self, source: slice, target: slice) -> None:
        """Copy rows over other rows."""
        if self._memory is not None:
            self._memory[:, target] = self._memory[:, source]


class KVCache:
    """The caches of all layers of a backbone.

    Args:
        num_layers: of the backbone.
        max_len: positions of a row.
        implementation: of the attention.
    """

    now: Pass  # the running forward pass
    flat_places: Tensor  # [R * S] int64: where it writes, over all rows

    def __init__(self, num_layers: int, max_len: int, implementation: Implementation = "sdpa"):
        self.layers = [LayerCache(self) for _ in range(num_layers)]
        self.max_len = max_len
        self.implementation: Implementation = implementation
        self.fixed_shapes = False  # see `fix_shapes`
        self.longest = 0  # no row has more positions
        self._level = True  # all rows have that many
        self._lengths: Tensor | None = None  # [R] int64
        self._real: Tensor | None = None  # [R, P] bool; None where nothing is padded
        self._padding: Tensor | int = 0  # [R] int64: padded positions of each row

    def begin(self, rows: int, new: int, device: torch.device, real: Tensor | None = None) -> Pass:
        """Start a forward pass of `new` positions in each row.

        real: [R, P] bool, for the first pass, the prefix's: False where a position is
            padding. None: nothing is padded.
        """
        first, start = self._lengths is None, 0 if self.fixed_shapes else self.longest
        if self._lengths is None:
            self._lengths = torch.zeros(rows, dtype=torch.int64, device=device)
            self._real = None if real is None else attention.padding(real)
            if self._real is not None:
                self._padding = (~self._real).sum(1)
        used = self.max_len if self.fixed_shapes else start + new
        assert used <= self.max_len, f"a cache of {self.max_len} positions was asked for {used}"
        places = self._lengths[:, None] + torch.arange(new, device=device)
        if first:
            pattern = attention.pattern(self._real, new, new, self.implementation, device)
        else:
            pattern = attention.cached_pattern(
                places, used, self._real, self.implementation, level=self._level
            )
        if not self._level:
            base = torch.arange(rows, device=device)[:, None] * self.max_len
            self.flat_places = (base + places).flatten()
        self._lengths = self._lengths + new
        if not self.fixed_shapes:
            self.longest = used
        self.now = Pass(places, start if self._level else None, used, pattern)
        return self.now

    @property
    def positions_RS(self) -> Tensor:
        """Where the new positions of the running pass are without the padding, 0 or
        more.
        """
        padding = self._padding if isinstance(self._padding, int) else self._padding[:, None]
        return (self.now.places_RS - padding).clamp(min=0)

    def fix_shapes(self) -> None:
        """From now on every pass sees all of the cache, what is not in use hidden, so that
        no shape depends on how much is.

        Called after the first pass. The rows must be rewound before each other one.
        """
        self.fixed_shapes, self._level = True, False
        for layer in self.layers:
            layer.mark_static()

    def rewind(self, lengths: Tensor, longest: int = 0, *, level: bool = False) -> None:
        """Keep the first positions of each row, as many as `lengths` [R] says.

        longest: the largest of them; not needed with fixed shapes. level: they are all
            equal.
        """
        self._lengths, self.longest, self._level = lengths, longest, level

    def keep_rows(self, order: Sequence[int], group: int = 1) -> None:
        """Keep some of the rows, at other places; `group` neighbouring rows belong
        together.

        order: the old number of each group that stays, by its new number. A group that
            moves takes the place of one that does not stay.
        """
        for target, source in enumerate(order):
            if source != target:
                old, new = (slice(number * group, (number + 1) * group) for number in (source, target))
                for layer in self.layers:
                    layer.move(old, new)
        rows = [group * index + member for index in order for member in range(group)]
        if self._lengths is not None:
            index = torch.tensor(rows, device=self._lengths.device)
            self._lengths = self._lengths[index]
            if self._real is not None and not isinstance(self._padding, int):
                self._real, self._padding = self._real[index], self._padding[index]
