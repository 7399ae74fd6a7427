"""Captions to features of a T5 encoder, with the caption cleaning that LlamaGen was trained with; class numbers.

`clean` takes the steps of FoundationVision/LlamaGen at ce98ec4 in its order, in expressions of our own; it needs the
packages ftfy and beautifulsoup4. Shapes: B batch, P caption slots, C width of a feature.
"""

from __future__ import annotations

import html
import re
import urllib.parse
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mmtensorar import devices
from mmtensorar.checkpoints.released import (
    Checkpoint,
    locate,
    read_config,
    weight_hash,
)
from mmtensorar.model.conditions import Condition

# original: clean, twice, as the original does. lower: lower case without surrounding white space, what the original
# does when its cleaning is off. none: as written.
Cleaning = Literal["original", "lower", "none"]


class T5Features:
    """Captions -> Condition of features, left-padded to num_slots.

    The encoder is read when the first captions come, so until then this can be sent to loader workers. device: None is
    this process's GPU if there is one; on a GPU it runs in bf16, as the original's default, on a CPU in float32. dim: C
    that the backbone was trained with, or None for any. Raises ValueError when there is no such encoder, its features
    are not dim wide, or a package that the cleaning needs is absent.
    """

    def __init__(
        self,
        path: str,
        *,
        num_slots: int,
        dim: int | None,
        cleaning: Cleaning = "original",
        device: torch.device | None = None,
    ):
        self.path, self.num_slots, self.dim, self.cleaning, self.device = (
            path,
            num_slots,
            dim,
            cleaning,
            device,
        )
        self._encoder = None
        if cleaning == "original":
            _cleaning_packages()

    def __call__(self, captions: Sequence[str]) -> Condition:
        """B captions -> values [B, P, C] float32, mask [B, P] bool, on the CPU."""
        return left_pad(self.features(captions), self.num_slots)

    def features(self, captions: Sequence[str]) -> list[Tensor]:
        """B captions -> B features [tokens, C] float32 on the CPU; each as long as its caption, cut at num_slots."""
        if self._encoder is None:
            self._load()
        batch = self._text_tokenizer(
            [prepare(caption, self.cleaning) for caption in captions],
            max_length=self.num_slots,
            padding="longest",
            truncation=True,
            return_tensors="pt",
        )
        device = self._encoder.device
        with torch.no_grad():
            features = self._encoder(
                input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)
            ).last_hidden_state
        lengths = batch["attention_mask"].sum(1).tolist()
        return [row[:length] for row, length in zip(features.float().cpu(), lengths, strict=True)]

    def _load(self) -> None:
        from transformers import PreTrainedTokenizerFast, T5EncoderModel

        folder = locate(self.path, key="backbone.text_encoder")
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"backbone.text_encoder: {folder} has no tokenizer.json")
        device = self.device or devices.pick(None)
        encoder = T5EncoderModel.from_pretrained(
            folder, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, use_safetensors=True
        )
        if self.dim not in (None, encoder.config.d_model):
            raise ValueError(
                f"backbone.text_encoder: {self.path} makes features of {encoder.config.d_model}, the backbone was "
                f"trained with {self.dim}"
            )
        self._text_tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        # The file's own setting wins over the argument of a call, and may be on the left.
        self._text_tokenizer.padding_side = self._text_tokenizer.truncation_side = "right"
        self._encoder = encoder.eval().requires_grad_(False).to(device)


def left_pad(features: Sequence[Tensor], num_slots: int) -> Condition:
    """B features [tokens, C] -> values [B, P, C] of num_slots places, zeros first, and their mask.

    LlamaGen has the caption's end next to the image tokens.
    """
    values = torch.zeros(len(features), num_slots, features[0].shape[1])
    mask = torch.zeros(len(features), num_slots, dtype=torch.bool)
    for row, feature in enumerate(features):
        values[row, num_slots - len(feature) :] = feature
        mask[row, num_slots - len(feature) :] = True
    return Condition(values, mask)


def encoder_hash(path: str, *, key: str = "backbone.text_encoder") -> str:
    """sha256 over the tensors that make a T5's features: the same in any file layout, with a decoder or without."""
    checkpoint = Checkpoint(locate(path, key=key))
    # embed_tokens is shared.weight again, in those files that hold it.
    parts = re.compile(r"shared\.weight|encoder\.(?!embed_tokens).+")
    names = [name for name in checkpoint.shapes if parts.fullmatch(name)]
    if "shared.weight" not in names or len(names) == 1:
        raise ValueError(f"{key}: {path} holds no T5 encoder")
    return weight_hash(dict(checkpoint.read(names)))


def encoder_width(path: str, *, key: str = "backbone.text_encoder") -> int:
    """C of a T5's features, from its config.json."""
    return read_config(locate(path, key=key, weights=False), "t5", key=key)["d_model"]


# ---- cleaning ------------------------------------------------------------------------------------


# T5 reads 120 tokens, a few hundred characters; some of the patterns below take time with the square of the length.
MAX_CLEANED_CHARS = 2048


def prepare(caption: str, cleaning: Cleaning) -> str:
    """A caption as its backbone's training saw it; "original" looks at the first MAX_CLEANED_CHARS characters."""
    if cleaning == "original":
        return clean(clean(caption[:MAX_CLEANED_CHARS]))
    return caption.lower().strip() if cleaning == "lower" else caption


def _cleaning_packages():
    try:
        import ftfy
        from bs4 import BeautifulSoup
    except ImportError as error:
        raise ValueError(
            f"caption_cleaning is original, which needs the package {error.name}: pip install -e '.[text]'; "
            "or set it to lower"
        ) from None
    return ftfy, BeautifulSoup


_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)

# (pattern, replacement), in this order, before and after the markup is taken out.
_LINKS = [
    (r"<person>", "person"),
    (
        r"\b(?:https?:(?:/{1,3}|[a-z0-9%])|www\d{0,3}\.|[a-z0-9.-]+\.(?:com|co|ru|net|org|edu|gov|it)\b/?(?!@))\S*",
        "",
    ),
]
_MARKS = [
    (r"@\w+\b", ""),  # nicknames
    # CJK strokes to unified ideographs
    (r"[\u31c0-\u31ef\u31f0-\u31ff\u3200-\u32ff\u3300-\u33ff\u3400-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff]+", ""),
    (f"[{_DASHES}]+", "-"),
    (r"[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    (r"[\u2018\u2019]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # article numbers
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILES})\b", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
]
_NOISE = [
    # names of files and wares: jc6640, jc6640vc, 6640vc231
    (r"\b[a-z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-z]+\d+[a-z]+\b", ""),
    (r"\b\d+[a-z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})\b(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-z]+\d+[a-z]+\d+[a-z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes, with a Latin or a Cyrillic x
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
]
_EDGES = [
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
]


def clean(caption: str) -> str:
    """One pass of the original's cleaning: links, markup, numbers of wares and the like go, the rest in lower case."""
    ftfy, soup = _cleaning_packages()
    text = urllib.parse.unquote_plus(str(caption)).strip().lower()
    text = _replace(text, _LINKS)
    text = _replace(soup(text, features="html.parser").text, _MARKS)
    if len(re.findall(r"[-_]", text)) > 3:
        text = re.sub(r"[-_]", " ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    text = _replace(text, _NOISE).strip()
    return _replace(text, _EDGES).strip()


def _replace(text: str, steps: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in steps:
        text = re.sub(pattern, replacement, text)
    return text


class ClassNumbers:
    """Class numbers (207, or "207", which is what such a sample's caption holds) -> Condition."""

    def __init__(self, num_classes: int):
        self.num_classes = num_classes

    def __call__(self, captions: Sequence[str | int]) -> Condition:
        """B numbers -> values [B, 1] int64, mask [B, 1] bool. Raises ValueError for another caption."""
        for caption in captions:
            if not (str(caption).strip().isdecimal() and int(caption) < self.num_classes):
                raise ValueError(
                    f"{caption!r} is no class of this class-conditional backbone; expected 0 to {self.num_classes - 1}"
                )
        return Condition(
            torch.tensor([[int(c)] for c in captions]), torch.ones(len(captions), 1, dtype=torch.bool)
        )
