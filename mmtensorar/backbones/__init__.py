"""Backbones: plain next-token image models, cut at the seams that TensorAR needs.

A backbone knows nothing of TensorAR, data or training. One file each; the recipe's
`backbone: {name: ...}` picks it, and that file's Config validates the section.
Shapes: B batch, P prefix, S rows, T image tokens, F factors, D width, V vocabulary.
"""

from __future__ import annotations

import importlib

from mmtensorar.checkpoints.released import Unread
from mmtensorar.model.conditions import CaptionEncoder
from mmtensorar.model.protocols import Backbone
from mmtensorar.recipe import Section


def _module(section: Section):
    return importlib.import_module(f"mmtensorar.backbones.{section.name}")


def load(
    section: Section, *, weights: bool = True, device: str = "cpu", sizes_only: bool = False
) -> Backbone:
    """The backbone a recipe names, in float32 and train mode.

    weights: False builds it with random weights, reading the configuration only. device:
    "meta" (without weights) builds the shapes alone. sizes_only: for a plan, the sizes of a released model may come
    from our own table, so that nothing is downloaded; such a backbone cannot be saved. Raises ValueError or OSError, naming
    the path, when there is no such model or it does not fit.
    """
    return _module(section).load(section, weights=weights, device=device, sizes_only=sizes_only)


def unread(section: Section) -> Unread:
    """The backbone a recipe names without its values, and the files that hold them. Raises ValueError like `load`."""
    return _module(section).unread(section)


def caption_encoder(section: Section) -> CaptionEncoder:
    """The function that turns captions into this backbone's Condition; it can be sent to loader workers."""
    return _module(section).caption_encoder(section)
