"""Caption encoders: features of a T5 encoder, and class numbers.

Shapes: B batch, P caption slots, C width of a feature.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtensorar import devices
from mmtensorar.captions import cleaning as caption_cleaning
from mmtensorar.captions.cleaning import Cleaning
from mmtensorar.captions.limits import beginning
from mmtensorar.checkpoints.released import ReleasedWeights, locate, read_config, weight_hash
from mmtensorar.model.conditions import Condition, ConditionKind, Excess, FeatureIdentity


class T5Features:
    """Captions -> Condition of features, left-padded to num_slots.

    The encoder is read when the first captions come; until then this can be pickled for
    loader workers. On a GPU it runs in bf16, as the original's default, on a CPU in
    float32.
    """

    kind: ConditionKind = "features"
    num_classes = None

    def __init__(
        self,
        path: str,
        *,
        num_slots: int,
        dim: int | None,
        cleaning: Cleaning = "original",
        device: torch.device | None = None,
    ):
        """
        Args:
            path: the encoder's folder or hub id.
            num_slots: P; longer captions are cut.
            dim: C that the backbone was trained with, or None for any.
            cleaning: see mmtensorar.captions.cleaning.
            device: None is this process's GPU if there is one.

        Raises ValueError when a package that the cleaning needs is missing; at the
        first captions, when there is no such encoder, or its features are not dim wide.
        """
        self.path, self.num_slots, self.dim, self.device = path, num_slots, dim, device
        self.cleaning: Cleaning = cleaning
        self._loaded: tuple[Any, Any] | None = None  # T5EncoderModel and its text tokenizer
        self.emptied = caption_cleaning.Emptied(cleaning)
        self._counter: Any = None  # the text tokenizer again, without a limit
        if cleaning in caption_cleaning.WITH_PACKAGES:
            caption_cleaning.require_packages()

    def __call__(self, captions: Sequence[str]) -> Condition:
        """B captions -> values [B, P, C] float32, mask [B, P] bool, on the CPU.

        Warns of captions of which the cleaning leaves nothing.
        """
        for caption in captions:
            self.emptied.add("", caption)
        return left_pad(self.features(captions), self.num_slots)

    def to(self, device: torch.device) -> None:
        """Run on this device; has an effect before the first captions only."""
        self.device = device

    def identity(self) -> FeatureIdentity:
        """See CaptionEncoder."""
        is_local = Path(self.path).is_dir()
        digest = encoder_hash(self.path) if is_local else None
        return FeatureIdentity(self.dim, self.num_slots, self.cleaning, self.path, digest)

    def features(self, captions: Sequence[str]) -> list[Tensor]:
        """B captions -> B features [tokens, C] float32 on the CPU, at most num_slots
        tokens each.

        Where the cleaning leaves nothing, they are the features of the end token.
        """
        self._loaded = self._loaded or self._load()
        encoder, text_tokenizer = self._loaded
        batch = text_tokenizer(
            [self._text(caption)[0] for caption in captions],
            max_length=self.num_slots,
            padding="longest",
            truncation=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            features = encoder(
                input_ids=batch["input_ids"].to(encoder.device),
                attention_mask=batch["attention_mask"].to(encoder.device),
            ).last_hidden_state
        lengths = batch["attention_mask"].sum(1).tolist()
        return [row[:length] for row, length in zip(features.float().cpu(), lengths, strict=True)]

    def excess(self, caption: str) -> Excess | None:
        """See CaptionEncoder.

        Needs the text tokenizer, but not the encoder's weights.
        """
        text, unread = self._text(caption)
        num_tokens = self._count(text)
        return Excess(num_tokens, self.num_slots, unread) if unread or num_tokens > self.num_slots else None

    def _text(self, caption: str) -> tuple[str, int]:
        """The text of a caption that is tokenized, and the number of characters that
        are not read.
        """
        prepared = caption_cleaning.prepare(caption, self.cleaning)
        read = beginning(prepared, self.num_slots, self._count)
        dropped = 0
        if self.cleaning in caption_cleaning.WITH_PACKAGES and prepared != caption:
            dropped = max(0, len(caption) - caption_cleaning.MAX_CLEANED_CHARS)
        return read, dropped + len(prepared) - len(read)

    def _count(self, text: str) -> int:
        """Tokens of a text, the end token included."""
        if self._counter is None:
            # Not the one that encodes, which cuts. `encode` runs in this thread: the
            # threads of `encode_batch` would hang in a forked process.
            self._counter = self._load_text_tokenizer(weights=False).backend_tokenizer
            self._counter.no_truncation()
            self._counter.no_padding()
        return len(self._counter.encode(text).ids)

    def _load_text_tokenizer(self, *, weights: bool) -> Any:
        from transformers import PreTrainedTokenizerFast

        folder = locate(self.path, key="backbone.text_encoder", weights=weights)
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"backbone.text_encoder: {folder} has no tokenizer.json")
        return PreTrainedTokenizerFast.from_pretrained(folder)

    def _load(self) -> tuple[Any, Any]:
        from transformers import T5EncoderModel

        text_tokenizer = self._load_text_tokenizer(weights=True)
        folder = locate(self.path, key="backbone.text_encoder")
        device = self.device or devices.pick(None)
        encoder: Any = T5EncoderModel.from_pretrained(
            folder, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, use_safetensors=True
        )
        if self.dim not in (None, encoder.config.d_model):
            raise ValueError(
                f"backbone.text_encoder: {self.path} makes features of {encoder.config.d_model}, "
                f"the backbone was trained with {self.dim}"
            )
        # Set here, since the setting in the file, which may be "left", overrides a
        # call's argument.
        text_tokenizer.padding_side = text_tokenizer.truncation_side = "right"
        return encoder.eval().requires_grad_(False).to(device), text_tokenizer


class ClassNumbers:
    """Class numbers (207, or "207" as in the captions of shards) -> Condition."""

    kind: ConditionKind = "class"

    def __init__(self, num_classes: int):
        self.num_classes = num_classes

    def __call__(self, captions: Sequence[str | int]) -> Condition:
        """B numbers -> values [B, 1] int64, mask [B, 1] bool.

        Raises ValueError for another caption.
        """
        for caption in captions:
            digits = str(caption).strip()
            if not (digits.isdecimal() and len(digits) < 20 and int(digits) < self.num_classes):
                raise ValueError(
                    f"caption {caption!r} is not a class number of this backbone "
                    f"(expected 0 to {self.num_classes - 1})"
                )
        return Condition(
            torch.tensor([[int(c)] for c in captions]), torch.ones(len(captions), 1, dtype=torch.bool)
        )

    def excess(self, caption: str | int) -> None:
        """A class number is never cut."""

    def to(self, device: torch.device) -> None:
        """Nothing to move."""

    def identity(self) -> None:
        """Class numbers have no text encoder."""


def left_pad(features: Sequence[Tensor], num_slots: int) -> Condition:
    """B features [tokens, C] -> values [B, P, C] with P = num_slots, zeros first, and
    their mask.

    In LlamaGen the caption's end is next to the image tokens.
    """
    values = torch.zeros(len(features), num_slots, features[0].shape[1])
    mask = torch.zeros(len(features), num_slots, dtype=torch.bool)
    for row, feature in enumerate(features):
        values[row, num_slots - len(feature) :] = feature
        mask[row, num_slots - len(feature) :] = True
    return Condition(values, mask)


def encoder_hash(path: str, *, key: str = "backbone.text_encoder") -> str:
    """SHA-256 over the encoder's tensors of a T5: the same in any file layout, with or
    without a decoder.
    """
    weights = ReleasedWeights(locate(path, key=key))
    # embed_tokens repeats shared.weight, in those files that hold it.
    of_encoder = re.compile(r"shared\.weight|encoder\.(?!embed_tokens).+")
    names = [name for name in weights.shapes if of_encoder.fullmatch(name)]
    if "shared.weight" not in names or len(names) == 1:
        raise ValueError(f"{key}: {path} holds no T5 encoder")
    return weight_hash(dict(weights.read(names)))


def encoder_width(path: str, *, key: str = "backbone.text_encoder") -> int:
    """C of a T5's features, from its config.json."""
    return read_config(locate(path, key=key, weights=False), "t5", key=key)["d_model"]
