"""The Python interface: a model folder that turns prompts into pictures.

    generator = Generator.load("runs/NAME/model")
    images = generator.images(["a red circle", "a blue star"], seeds=[0, 1])
    images = generator.images([207, 360], seeds=[0, 1])      of a class-conditional model

Shapes: B batch, T image tokens, K window, F factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from mmtensorar import devices
from mmtensorar.checkpoints import model_folder
from mmtensorar.files import atomic_path
from mmtensorar.image_tokenizers import to_images
from mmtensorar.sampling.decode import Decoded, Sampler, decode

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Sampling(Sampler):
    """A sampler and the guidance scale, one number or one per factor, 1 is no guidance; the others: see `decode`.

    Raises ValueError for a value out of range.
    """

    cfg_scale: float | Sequence[float] = 1.0
    stride: int = 1
    lookahead: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("cfg_scale", lambda x: x >= 0 and isfinite(x), "a number, 0 or more")


class Generator:
    """A loaded checkpoint that turns prompts into images. A prompt is a caption, or a class number.

    Every row draws from its own generator, so the same prompt and seed give the same random numbers in any batch. A row's
    floats may still differ in the last bits between batches, because
    prompts are padded to the longest of the batch, and then a token near a tie may come out differently. Equal
    batches give equal images.
    """

    def __init__(self, loaded: model_folder.Loaded, *, precision: str = "fp32"):
        self.model, self.image_tokenizer, self.caption_encoder, self.recipe = loaded
        if self.image_tokenizer is None:
            raise ValueError(
                "the checkpoint has no image tokenizer: convert it again, with --image-tokenizer"
            )
        self.device = next(self.model.parameters()).device
        self.caption_encoder.to(self.device)
        self.precision = precision

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: str | None = None,
        precision: str | None = None,
        attn_implementation: str | None = None,
    ) -> Generator:
        """Load a consolidated checkpoint.

        device: None is the GPU if there is one. precision: fp32 or bf16; None is bf16 on a GPU, fp32 on a CPU. On a
        CPU bf16 keeps the weights in float32 and computes under autocast. attn_implementation: None is sdpa. Raises
        ValueError for a folder that is no whole checkpoint, an unknown precision, an absent device, or an attention
        that cannot be used here.
        """
        chosen = devices.pick(device)
        if precision is None:
            precision = "bf16" if chosen.type == "cuda" else "fp32"
        if precision not in DTYPES:
            raise ValueError(f"precision is {precision!r}; expected one of {', '.join(DTYPES)}")
        dtype = DTYPES[precision] if chosen.type == "cuda" else torch.float32
        attention = attn_implementation or "sdpa"
        return cls(
            model_folder.load(folder, chosen, dtype, attn_implementation=attention), precision=precision
        )

    def runs_as(self) -> dict[str, str]:
        """What results may depend on beside the settings: kind of device, precision, implementation of attention."""
        attention = self.recipe.backbone.attn_implementation
        return {"device": self.device.type, "precision": self.precision, "attn_implementation": attention}

    def sampling(self, **settings) -> Sampling:
        """The recipe's sampler settings, with those given (and not None) instead. Raises ValueError."""
        given = {key: value for key, value in settings.items() if value is not None}
        return Sampling(**(self.recipe.sampler.model_dump() | given))

    def check(self, prompts: Sequence[str | int]) -> None:
        """Raise ValueError unless prompts are what the model is conditioned on: captions, or numbers of its classes."""
        if self.caption_encoder.kind == "class":
            # "207" is what shards and evaluation suites call class 207.
            if captions := [
                prompt for prompt in prompts if isinstance(prompt, str) and not prompt.strip().isdecimal()
            ]:
                last = self.caption_encoder.num_classes - 1
                raise ValueError(
                    f"this model is class-conditional: it takes class numbers (--class), 0 to {last}, and no prompts "
                    f"such as {captions[0]!r}"
                )
            self.caption_encoder(prompts)
        elif numbers := [prompt for prompt in prompts if not isinstance(prompt, str)]:
            raise ValueError(
                "this model is text-conditional: it takes prompts (--prompt), and no class numbers such as "
                f"{numbers[0]}"
            )

    @torch.no_grad()
    def decode(
        self,
        prompts: Sequence[str | int],
        seeds: Sequence[int],
        sampling: Sampling | None = None,
        *,
        keep_trace: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Decoded:
        """One batch of image codes [B, T, F], and with keep_trace the windows [B, T, K, F].

        progress is called with (tokens done, T) after each step. Raises ValueError unless there is one seed, 0 or
        more, per prompt, for prompts of the wrong kind, and when the GPU's memory is too small for the batch.
        """
        if len(prompts) != len(seeds) or not prompts:
            raise ValueError(
                f"{len(prompts)} prompts and {len(seeds)} seeds; expected one seed per prompt, at least one"
            )
        for seed in seeds:
            check_seed(seed)
        self.check(prompts)
        sampling = sampling or self.sampling()
        # CPU generators: a seed means the same numbers on every device.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        try:
            with self._autocast():
                return decode(
                    self.model,
                    self.caption_encoder(list(prompts)),
                    sampling,
                    cfg_scale=sampling.cfg_scale,
                    stride=sampling.stride,
                    lookahead=sampling.lookahead,
                    generator=generators,
                    keep_trace=keep_trace,
                    progress=progress,
                )
        except torch.OutOfMemoryError:
            raise ValueError(
                f"the GPU has too little memory for a batch of {len(prompts)}; try a smaller one"
            ) from None

    @torch.no_grad()
    def pictures(self, codes: Tensor) -> list[Image.Image]:
        """Codes [B, T, F] -> B RGB images; the image tokenizer always runs in float32."""
        return to_images(self.image_tokenizer.decode(codes.to(self.device)))

    def images(
        self,
        prompts: Sequence[str | int],
        seeds: Sequence[int],
        sampling: Sampling | None = None,
        *,
        batch_size: int = 16,
    ) -> list[Image.Image]:
        """One image per prompt and seed, in order. Raises ValueError like `decode`."""
        images = []
        for start in range(0, max(len(prompts), len(seeds)), batch_size):
            part = slice(start, start + batch_size)
            images += self.pictures(self.decode(prompts[part], seeds[part], sampling).codes)
        return images

    def _autocast(self):
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.precision])


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; expected 0 or more, and less than 2^63")


def revisions(trace: Tensor) -> Tensor:
    """Windows of every step [B, T, K, F] -> the codes as they stood at each revision [B, K, T, F].

    trace[:, t, j] is position t + j as drafted at step t. Revision r takes position p from step p - (K-1-r), where
    it stood at offset K-1-r; r = K-1 is the final image. The first K-1 positions are never drafted that early and
    are taken from step 0. A place without a draft, -1, stands as at the next revision.
    """
    T, K = trace.shape[1:3]
    places = torch.arange(T, device=trace.device)
    offsets = torch.minimum(torch.arange(K - 1, -1, -1, device=trace.device)[:, None], places)  # [K, T]
    found = trace[:, places - offsets, offsets]
    for revision in range(K - 2, -1, -1):
        found[:, revision] = torch.where(found[:, revision] < 0, found[:, revision + 1], found[:, revision])
    return found


def save_png(image: Image.Image, path: Path, **text: object) -> None:
    """Write a PNG that appears whole or not at all, with text chunks that picture viewers can show."""
    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, str(value))
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG", pnginfo=info)
