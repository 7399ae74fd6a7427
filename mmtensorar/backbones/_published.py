"""Base of the backbones in our own code: layers, the authors' tensor names,
config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import save_torch_state_dict
from pydantic import BaseModel
from torch import Tensor, nn

from mmtensorar.checkpoints.released import LazyWeights, ReleasedWeights, fill, write_config
from mmtensorar.model import attention, kv_cache, layers
from mmtensorar.model.conditions import Condition, ConditionKind
from mmtensorar.recipe import BackboneConfig


class PublishedBackbone(nn.Module):
    """Base of backbones made of `layers.Block`; see
    mmtensorar.model.protocols.Backbone.

    A subclass sets `name`, `condition`, `default_sampling`, `pixels_per_token` and
    `official_names`, builds `prefix`, `embed`, `layers` and `head`, and then calls
    `init_weights`.
    """

    name: str
    condition: ConditionKind
    default_sampling: dict[str, Any]
    pixels_per_token: int  # a side
    official_names: Mapping[str, str]  # how our names begin -> how the authors' begin; others are the same
    lora_targets = r"layers\.\d+\.(attention|feed_forward)\.\w+"
    layers: nn.ModuleList

    def __init__(
        self,
        config: Any,
        *,
        grid: int,
        factor_sizes: tuple[int, ...],
        attn_implementation: attention.Implementation,
    ):
        """
        Args:
            config: what config.json holds (pydantic), with `dim` and `prefix_len`.
            grid: image tokens a side.
            factor_sizes: see Backbone.
            attn_implementation: see mmtensorar.model.attention.
        """
        super().__init__()
        self.config = config
        self.dim: int = config.dim
        self.prefix_len: int = config.prefix_len
        self.max_prefix_len = self.prefix_len
        self.num_tokens = grid**2
        self.image_size = grid * self.pixels_per_token
        self.factor_sizes = factor_sizes
        self.attn_implementation: attention.Implementation = attn_implementation
        self.activation_checkpointing: layers.Checkpointing = False

    def init_weights(self, *outputs: nn.Module) -> None:
        """Draw weights as both originals do: normal with std 0.02, and zero for the
        maps to logits.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        for output in outputs:
            nn.init.zeros_(output.get_parameter("weight"))

    def new_cache(self, max_len: int) -> kv_cache.KVCache:
        """See Backbone."""
        return kv_cache.KVCache(len(self.layers), max_len, self.attn_implementation)

    def run_layers(
        self, hidden: Tensor, table: Tensor, padding: Tensor | None, cache: kv_cache.KVCache | None
    ) -> Tensor:
        """[B, S, D] through all layers.

        Args:
            table: of `layers.rotary_table`.
            padding: [B, S] bool, False where a position is padding; None if none is.
                Behind a cache it is read in the first pass only.
        """
        blocks: Any = self.layers
        policy = self.activation_checkpointing
        B, S, _ = hidden.shape
        if cache is None:
            rows = table[:S]
            pattern = attention.pattern(padding, S, S, self.attn_implementation, hidden.device)
        else:
            step = cache.begin(B, S, hidden.device, padding)
            rows, pattern = layers.rotary_rows(table, step), step.pattern
        return layers.run(blocks, hidden, rows, pattern, cache, activation_checkpointing=policy)

    def example_condition(self, num_rows: int, prompt_len: int) -> Condition:
        """See Backbone: class numbers."""
        values = torch.zeros(num_rows, self.prefix_len, dtype=torch.long)
        return Condition(values, torch.ones(num_rows, self.prefix_len, dtype=torch.bool))

    def check_prompts(self, section: BackboneConfig) -> None:
        """See Backbone: no file of the released model is needed."""

    @classmethod
    def official_name(cls, name: str) -> str:
        """The authors' name of one of our tensors."""
        for ours, official in cls.official_names.items():
            if name.startswith(ours):
                return official + name.removeprefix(ours)
        return name

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and safetensors under the official tensor names."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_config(folder)
        state = {
            self.official_name(name): value.detach().cpu().contiguous()
            for name, value in self.state_dict().items()
        }
        save_torch_state_dict(state, folder, max_shard_size="5GB")

    def save_config(self, folder: Path) -> None:
        """Write config.json."""
        write_config(folder, self.name, self.config.model_dump())


Model = TypeVar("Model", bound=PublishedBackbone)


@contextmanager
def plan_hint(path: str, unset: list[str], *, wanted: bool) -> Iterator[None]:
    """Add a hint to a ValueError: with which settings a plan needs no model file.

    Args:
        path: backbone.path, which may not exist.
        unset: names of the settings that give the sizes of a released model, and are
            missing.
        wanted: whether this is for a plan.
    """
    try:
        yield
    except ValueError as error:
        if not (wanted and unset) or Path(path).exists():
            raise
        keys = ", ".join(f"backbone.{key}" for key in unset)
        raise ValueError(f"{error}; to plan a released model without its file, set {keys}") from None


def build(make: Callable[[], Model], *, device: str) -> Model:
    """A backbone with random weights on a device."""
    with torch.device(device):
        return make()


def load(
    make: Callable[[], Model],
    source: Path | ReleasedWeights,
    *,
    device: str,
    ignore: Callable[[str], Any],
) -> Model:
    """A backbone filled from released weights. ignore: see `released.fill`."""
    with torch.device("meta"):  # every tensor is filled below, so none needs random values
        backbone = make()
    backbone.to_empty(device=device)
    fill(backbone.state_dict(), source, backbone.official_name, ignore=ignore)
    return backbone


def lazy_weights(
    make: Callable[[], Model], source: Path | ReleasedWeights, *, ignore: Callable[[str], Any]
) -> LazyWeights:
    """See mmtensorar.backbones.lazy_weights."""
    with torch.device("meta"):
        backbone = make()
    source = source if isinstance(source, ReleasedWeights) else ReleasedWeights(source)
    return LazyWeights(backbone, source, backbone.official_name, backbone.official_name, ignore)


def differences(config: BaseModel, expected: BaseModel) -> str:
    """The settings in which two architectures differ, as text."""
    pairs = zip(config, expected, strict=True)
    return ", ".join(f"{name} {a}, expected {b}" for (name, a), (_, b) in pairs if a != b)


def tensors_of(weights: LazyWeights) -> dict[str, Tensor]:
    """All tensors under the official names; they stay on disk until they are used."""
    return dict(weights.tensors())
