"""Measure activation memory by running the model on fake tensors (shapes, no
values).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that are created inside this with statement.

    live: bytes in use now. peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def ignore(self, tensors: list[Tensor]) -> None:
        """Do not count these tensors, which existed before."""
        for tensor in tensors:
            self._known.add(id(tensor.untyped_storage()))
        # Kept alive, so that no other storage gets one of these ids.
        self._ignored = [tensor.untyped_storage() for tensor in tensors]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def of_a_step(model: nn.Module, loss_of: Callable[[nn.Module], Tensor]) -> int:
    """Peak bytes of forward and backward, without weights and gradients.

    Args:
        model: on the meta device; its tensors cannot be used afterwards.
        loss_of: creates inputs and runs the model.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        with Peak() as peak:
            peak.ignore([*model.parameters(), *model.buffers()])
            loss_of(model).backward()
    return peak.peak


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
