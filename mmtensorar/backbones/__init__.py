"""Backbones: plain next-token image models, divided into the parts that TensorAR
needs.

A backbone does not depend on TensorAR, data or training. There is one file per
backbone. The recipe's `backbone: {name: ...}` selects it, and the file's Config
validates the section. mmtensorar/model/protocols.py lists what a file defines.
"""

from __future__ import annotations

import importlib
from typing import cast

from mmtensorar.checkpoints.released import LazyWeights
from mmtensorar.model.conditions import CaptionEncoder
from mmtensorar.model.protocols import Backbone, BackboneFile
from mmtensorar.recipe import NamedSection


def file(name: str) -> BackboneFile:
    """The file that defines a backbone, imported."""
    return cast(BackboneFile, importlib.import_module(f"{__name__}.{name}"))


def load(
    section: NamedSection, *, weights: bool = True, device: str = "cpu", sizes_only: bool = False
) -> Backbone:
    """The backbone a recipe names, in float32 and train mode.

    Args:
        section: the recipe's `backbone`.
        weights: False gives random weights, and reads only the configuration.
        device: "meta" (without weights) gives shapes only.
        sizes_only: for a plan. The sizes of a released model may come from our own
            table, so that nothing is downloaded; such a backbone cannot be saved.

    Raises ValueError or OSError, naming the path, when there is no such model or it
    does not fit.
    """
    return file(section.name).load(section, weights=weights, device=device, sizes_only=sizes_only)


def lazy_weights(section: NamedSection) -> LazyWeights:
    """The backbone a recipe names on the meta device, and the files with its values.

    Raises ValueError like `load`.
    """
    return file(section.name).lazy_weights(section)


def caption_encoder(section: NamedSection) -> CaptionEncoder:
    """The function that turns captions into this backbone's Condition.

    It can be pickled.
    """
    return file(section.name).caption_encoder(section)
