"""The complete interfaces of backbones and image tokenizers.

A file in `mmtensorar/backbones` or `mmtensorar/image_tokenizers` follows two protocols:
one for the file itself (`BackboneFile`, `ImageTokenizerFile`) and one for the module
that its `load` returns (`Backbone`, `ImageTokenizer`). tests/backbones/test_contract.py
checks every file, found by listing.

Shapes: B batch, P prefix, S rows, T image tokens, F factors, D width, V vocabulary, H W
pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from mmtensorar.model.conditions import CaptionEncoder, Condition, ConditionKind
from mmtensorar.model.kv_cache import KVCache
from mmtensorar.model.layers import Checkpointing
from mmtensorar.recipe import BackboneConfig, NamedSection

# ---- heads ---------------------------------------------------------------------------------------


@runtime_checkable
class Head(Protocol):
    """An nn.Module that turns hidden states into logits, one factor after the other.

    It computes head(hidden, prev) = output_maps[f](states(hidden, prev)). The loss uses
    the two halves to replace the last product with another kernel (see `model.loss`).
    """

    @property
    def output_maps(self) -> Sequence[nn.Module]:
        """The last linear map of each factor.

        A `layers.OutputMap` can run a fused loss.
        """
        ...

    def states(self, hidden: Tensor, prev: Tensor) -> Tensor:
        """What output_maps[f] takes: hidden [..., D], prev [..., f] int64,
        f = prev.shape[-1].

        It uses parameters only by calling submodules, as ZeRO-3 needs.
        """
        ...

    def __call__(self, hidden: Tensor, prev: Tensor) -> Tensor:
        """hidden [..., D], earlier factors prev [..., f] int64 -> logits [..., V_f] of
        factor f.
        """
        ...


# ---- backbones -----------------------------------------------------------------------------------


class Backbone(Protocol):
    """A plain next-token image model: an nn.Module with these parts.

    embed, prefix and head are modules, not methods, because ZeRO-3 gathers parameters
    around `forward`.
    """

    name: str  # the file's
    dim: int  # D
    num_tokens: int  # T
    factor_sizes: tuple[int, ...]  # (V_0, ..., V_{F-1})
    image_size: int  # pixels a side of the images that it was trained on
    condition: ConditionKind  # the kind that `prefix` takes
    prefix_len: int | None  # P; None where it is the length of the prompt
    max_prefix_len: int  # the largest P: prefix_len, or the limit on the tokens of a prompt
    default_sampling: dict[str, Any]  # sampler settings of the authors' demo; a converted recipe gets them
    lora_targets: str  # regular expression: names, inside the backbone, of the matrices that get adapters
    layers: nn.ModuleList  # the transformer's layers; train.compile compiles each of them
    activation_checkpointing: Checkpointing  # set before training
    embed: nn.Module  # codes [..., F] -> [..., D]
    prefix: nn.Module  # (Condition, uncond [B] bool) -> Prefix; uncond rows get the null prompt
    head: Head

    def __call__(self, embeds: Tensor, mask: Tensor | None, cache: Any = None) -> Tensor:
        """Causal hidden states: embeds [B, S, D], mask [B, S] bool -> [B, S, D].

        With a cache, of `new_cache`, the S rows follow the positions that the cache
        holds of each row of the batch. The mask is read in the first pass, that of the
        prefix; later it is None. `head` takes the result.
        """
        ...

    def new_cache(self, max_len: int) -> KVCache:
        """An empty key-value cache for max_len positions."""
        ...

    def example_condition(self, num_rows: int, prompt_len: int) -> Condition:
        """A condition of the right shape and dtype, whose values do not matter, for
        plans.

        prompt_len: P where the backbone has no `prefix_len`.
        """
        ...

    def check_prompts(self, section: BackboneConfig) -> None:
        """Raise ValueError when a file that `caption_encoder` needs is missing in the
        released model.
        """
        ...

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and the text tokenizer, for `load` to
        read.
        """
        ...

    def save_config(self, folder: Path) -> None:
        """Write the same into an existing folder, without the weights."""
        ...


class BackboneFile(Protocol):
    """The names that a file in mmtensorar/backbones defines.

    Its functions are described in mmtensorar/backbones/__init__.py, except
    `write_original`, here. `lazy_weights` returns a `LazyWeights` of
    mmtensorar/checkpoints/released.py.
    """

    Config: type[BackboneConfig]  # validates the recipe's `backbone` section
    SIGNATURES: tuple[str, ...]  # tensors that only this backbone's released files have
    MODEL_TYPES: tuple[str, ...]  # model_type in config.json of its released folders and of ours
    IMAGE_TOKENIZER: str  # file in mmtensorar/image_tokenizers that it was trained with
    IMAGE_TOKENIZER_PREFIXES: tuple[str, ...]  # of its tensors in the backbone's released file; () if absent

    load: Callable[..., Any]
    lazy_weights: Callable[..., Any]
    caption_encoder: Callable[..., CaptionEncoder]

    def write_original(
        self,
        target: Path,
        weights: Any,
        *,
        image_tokenizer: ImageTokenizer | None,
        base: Callable[[], str],
    ) -> str:
        """Write a model of window 1 as its authors' code reads it; returns what was
        written, for a message.

        Args:
            target: the file or folder to write, which does not exist.
            weights: the LazyWeights of a model folder's backbone.
            image_tokenizer: to write into the same file, where the authors' file holds
                it.
            base: returns the path of the released model that training began from, for
                parts that we do not load. Called only by backbones that need it; raises
                ValueError when it is unknown.
        """
        ...


# ---- image tokenizers ----------------------------------------------------------------------------


class ImageTokenizer(Protocol):
    """Pixels to codes and back: a frozen nn.Module in eval mode and float32, with these
    parts.
    """

    name: str  # the file's
    weight_hash: str  # SHA-256 over names and float32 values: the same weights in any file layout
    image_size: int  # pixels a side
    grid: tuple[int, int]  # codes down, codes across
    factor_sizes: tuple[int, ...]

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> codes [B, T, F] int64."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, T, F] -> [B, 3, H, W], about -1..1, not clamped."""
        ...

    def vectors(self, codes: Tensor) -> Tensor:
        """Codes [B, T, F] -> [B, T, C] float32: the vector of each token that the
        decoder reads.
        """
        ...

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """That of nn.Module."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """That of nn.Module."""
        ...

    def misfit(self, backbone: Backbone) -> str | None:
        """Why this image tokenizer does not belong to a backbone with equal code
        shapes; None if it may.
        """
        ...

    def official_tensors(self) -> dict[str, Tensor]:
        """The tensors under their authors' names."""
        ...

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, for `load` to read."""
        ...


class ImageTokenizerFile(Protocol):
    """The names that a file in mmtensorar/image_tokenizers defines."""

    Config: type[NamedSection]  # validates the recipe's `image_tokenizer` section
    SIGNATURES: tuple[str, ...]  # tensors that only this tokenizer's released files have
    MODEL_TYPES: tuple[str, ...]  # model_type in config.json of its released folders and of ours
    ORIGINAL_KEY: str | None  # key of its authors' PyTorch file that holds the tensors; None: no such file

    load: Callable[..., ImageTokenizer]
