"""What the rest of the package asks of a backbone and of an image tokenizer.

A file in `mmtensorar/backbones` or `mmtensorar/image_tokenizers` follows two protocols: one for the
file itself (`BackboneFile`, `ImageTokenizerFile`) and one for the module that its `load` returns
(`Backbone`, `ImageTokenizer`). tests/backbones/test_contract.py checks every file, found by listing.

Shapes: B batch, P prefix, S rows, T image tokens, F factors, D width, V vocabulary, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from mmtensorar.model.conditions import CaptionEncoder, Condition, ConditionKind
from mmtensorar.model.layers import Checkpointing
from mmtensorar.recipe import Section

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
    default_sampling: dict[str, Any]  # sampler settings of the authors' demo; a converted recipe gets them
    lora_targets: str  # regular expression: names, inside the backbone, of the matrices that get adapters
    layers: nn.ModuleList  # the transformer's, of which train.compile compiles each
    activation_checkpointing: Checkpointing  # set before training
    embed: nn.Module  # codes [..., F] -> [..., D]
    prefix: nn.Module  # (Condition, uncond [B] bool) -> Prefix; uncond rows get the null prompt
    # (hidden [..., D], prev [..., f]) -> logits [..., V_f], f = prev.shape[-1]. A head that has `last_map`, the linear map that its
    # logits come out of, takes targets [...] too, and then gives their summed cross entropy.
    head: nn.Module

    def __call__(self, embeds: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
        """[B, S, D], [B, cached + S] bool -> [B, S, D], what `head` takes; causal; S rows follow the cache."""
        ...

    def new_cache(self, max_len: int) -> Any:
        """An empty key-value cache for max_len places: layers, or an object with `layers`, each with crop(length)."""
        ...

    def example_condition(self, num_rows: int, prompt_len: int) -> Condition:
        """A condition of the right shape and dtype, whose values do not matter, for plans.

        prompt_len: P where the backbone has no `prefix_len`.
        """
        ...

    def check_prompts(self, section: Section) -> None:
        """Raise ValueError when a file that `caption_encoder` needs is missing in the released model."""
        ...

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and the text tokenizer, for `load` to read."""
        ...

    def save_config(self, folder: Path) -> None:
        """The same into an existing folder, without the weights."""
        ...


class BackboneFile(Protocol):
    """The names that a file in mmtensorar/backbones defines.

    Its functions are described in mmtensorar/backbones/__init__.py, except `write_original`, here.
    `lazy_weights` returns a `LazyWeights` of mmtensorar/checkpoints/released.py.
    """

    Config: type[BackboneConfig]  # validates the recipe's `backbone` section
    SIGNATURES: tuple[str, ...]  # tensors that only this backbone's released files have
    MODEL_TYPES: tuple[str, ...]  # model_type in config.json of its released folders and of ours
    IMAGE_TOKENIZER: (
        str  # file in mmtensorar/image_tokenizers of the image tokenizer that it was trained with
    )
    IMAGE_TOKENIZER_PREFIXES: tuple[str, ...]  # of that one's tensors in a released file; () if not in it

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
        """Write a model of window 1 as its authors' code reads it; returns what was written, for a message.

        Args:
            target: the file or folder to write, which does not exist.
            weights: the LazyWeights of a model folder's backbone.
            image_tokenizer: to write into the same file, where the authors' file holds it.
            base: returns the path of the released model that training began from, for parts that we do not
                load. Called only by backbones that need it; raises ValueError when it is unknown.
        """
        ...


class BackboneConfig(Section):
    """Base of the `backbone` sections. A subclass has `name`, `path` and `attn_implementation`, and its own."""

    def at(self, path: str) -> BackboneConfig:
        """The section of the same backbone, saved in the folder `path`."""
        return self.model_copy(update={"path": path})


# ---- image tokenizers ----------------------------------------------------------------------------


class ImageTokenizer(Protocol):
    """Pixels to codes and back: an nn.Module, frozen, in eval mode, float32, with these parts."""

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

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """That of nn.Module."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """That of nn.Module."""
        ...

    def misfit(self, backbone: Backbone) -> str | None:
        """Why this is not the image tokenizer of a backbone with the same codes, or None if it may be."""
        ...

    def official_tensors(self) -> dict[str, Tensor]:
        """The tensors under their authors' names."""
        ...

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, for `load` to read."""
        ...


class ImageTokenizerFile(Protocol):
    """The names that a file in mmtensorar/image_tokenizers defines."""

    Config: type[Section]  # validates the recipe's `image_tokenizer` section; has `name` and `path`
    SIGNATURES: tuple[str, ...]  # tensors that only this tokenizer's released files have
    MODEL_TYPES: tuple[str, ...]  # model_type in config.json of its released folders and of ours
    ORIGINAL_KEY: str | None  # key of its authors' PyTorch file that holds the tensors; None: no such file

    load: Callable[..., ImageTokenizer]
