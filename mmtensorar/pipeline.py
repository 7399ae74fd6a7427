"""The Python interface: a model folder that turns prompts into images.

    generator = Generator.load("runs/NAME/model")
    images = generator.images(["a red circle", "a blue star"], seeds=[0, 1])
    images = generator.images([207, 360], seeds=[0, 1])      # a class-conditional model

Shapes: B batch, T image tokens, K window, F factors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from mmtensorar import devices, ranks
from mmtensorar.captions.limits import excesses
from mmtensorar.checkpoints import model_folder
from mmtensorar.files import atomic_path
from mmtensorar.image_tokenizers import to_images
from mmtensorar.model.attention import Implementation
from mmtensorar.recipe import SamplerSettings
from mmtensorar.sampling.decode import Decoded, decode
from mmtensorar.sampling.settings import merge
from mmtensorar.seeds import check_seed
from mmtensorar.words import counted

NUM_NAMED = 5  # prompts of one call that are printed when they are cut; more are counted
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Generator:
    """A loaded model folder that turns prompts into images.

    A prompt is a caption, or a class number for a class-conditional model.

    Each image has its own random numbers, made from its seed, so the same prompt and
    seed give the same numbers in any batch. Floats may still differ in their last bits
    between batches, because prompts are padded to the longest of the batch; then a
    token near a tie may come out differently. Equal batches give equal images.

    Raises ValueError for a model folder without an image tokenizer.
    """

    def __init__(self, loaded: model_folder.Loaded, *, precision: str = "fp32", compile: bool = False):
        self.model, self.image_tokenizer, self.caption_encoder, self.recipe = loaded
        if self.image_tokenizer is None:
            raise ValueError(
                "the model folder has no image tokenizer: convert it again, with --image-tokenizer"
            )
        self.device = next(self.model.parameters()).device
        self.caption_encoder.to(self.device)
        self.precision, self.compile = precision, compile
        self._warned: set[str] = set()  # prompts whose cut has been printed

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: str | None = None,
        precision: str | None = None,
        attn_implementation: Implementation | None = None,
        compile: bool | None = None,
    ) -> Generator:
        """Load a model folder.

        Args:
            device: None is the GPU if there is one.
            precision: fp32 or bf16; None is bf16 on a GPU, fp32 on a CPU. On a CPU bf16
                keeps the weights in float32 and computes under autocast.
            attn_implementation: None is sdpa.
            compile: compile a pass of the model into one CUDA graph, on a GPU; None is
                no. See mmtensorar.sampling.compiled.

        Raises ValueError for an incomplete model folder, an unknown precision, a device
        that does not exist, or an attention implementation or `compile` that cannot be
        used on it.
        """
        chosen = devices.pick(device)
        if compile and chosen.type != "cuda":
            raise ValueError(f"compile is on, but the device is {chosen.type}; it needs a CUDA GPU")
        if precision is None:
            precision = "bf16" if chosen.type == "cuda" else "fp32"
        if precision not in DTYPES:
            raise ValueError(f"precision is {precision!r}; expected one of {', '.join(DTYPES)}")
        dtype = DTYPES[precision] if chosen.type == "cuda" else torch.float32
        attention = attn_implementation or "sdpa"
        loaded = model_folder.load(folder, chosen, dtype, attn_implementation=attention)
        return cls(loaded, precision=precision, compile=bool(compile))

    def runs_as(self) -> dict[str, str]:
        """What images may depend on besides the settings: device, precision, attention,
        and whether passes are compiled.
        """
        attention = self.recipe.backbone.model_dump()["attn_implementation"]
        runs = {"device": self.device.type, "precision": self.precision, "attn_implementation": attention}
        return runs | ({"compile": "passes"} if self.compile else {})

    def sampling(self, **given: Any) -> SamplerSettings:
        """The recipe's sampling settings, replaced by those given that are not None.

        Raises ValueError for an invalid setting.
        """
        return merge(self.recipe.sampler, given)

    def check(self, prompts: Sequence[str | int]) -> None:
        """Raise ValueError for prompts of the wrong kind.

        A model takes either captions or class numbers. Prints a warning for prompts
        that are longer than the model's limit, once for each: their end is cut.
        """
        if self.caption_encoder.kind == "class":
            # Shards and evaluation suites write class 207 as "207".
            if captions := [
                prompt for prompt in prompts if isinstance(prompt, str) and not prompt.strip().isdecimal()
            ]:
                last = self.caption_encoder.num_classes - 1
                raise ValueError(
                    f"this model is class-conditional: it takes class numbers (--class), 0 to {last}, "
                    f"not prompts such as {captions[0]!r}"
                )
            self.caption_encoder(prompts)
        elif numbers := [prompt for prompt in prompts if not isinstance(prompt, str)]:
            raise ValueError(
                "this model is text-conditional: it takes prompts (--prompt), not class numbers such as "
                f"{numbers[0]}"
            )
        else:
            self._warn_of_cuts([str(prompt) for prompt in prompts])

    def _warn_of_cuts(self, prompts: Sequence[str]) -> None:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._warned]
        cut = [(new[number], excess) for number, excess in excesses(self.caption_encoder, new)]
        self._warned.update(new)
        if not ranks.is_first():
            return
        for prompt, excess in cut[:NUM_NAMED]:
            shown = prompt if len(prompt) <= 60 else prompt[:57] + "..."
            print(f"warning: the prompt {shown!r} has {excess}, so its end is cut", file=sys.stderr)
        if len(cut) > NUM_NAMED:
            print(f"warning: {len(cut)} prompts are cut in all", file=sys.stderr)

    @torch.no_grad()
    def decode(
        self,
        prompts: Sequence[str | int],
        seeds: Sequence[int],
        sampling: SamplerSettings | None = None,
        *,
        keep_trace: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Decoded:
        """Generate the codes of one batch.

        Args:
            prompts: B captions or class numbers, at least one.
            seeds: B seeds, each 0 or more.
            sampling: None is the recipe's settings.
            keep_trace: return the windows of all steps too.
            progress: called with (final tokens, T) whenever more tokens are final.

        Raises ValueError when the numbers of seeds and prompts differ, for prompts of
        the wrong kind, and when the batch does not fit into the GPU's memory.
        """
        if len(prompts) != len(seeds) or not prompts:
            raise ValueError(
                f"{counted(len(prompts), 'prompt')} and {counted(len(seeds), 'seed')}; "
                "expected one seed per prompt, at least one"
            )
        for seed in seeds:
            check_seed(seed)
        self.check(prompts)
        # On the CPU: a seed means the same numbers on every device.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        try:
            with self._autocast():
                return decode(
                    self.model,
                    self.caption_encoder(list(prompts)),
                    sampling or self.recipe.sampler,
                    generator=generators,
                    keep_trace=keep_trace,
                    compile_passes=self.compile,
                    progress=progress,
                )
        except torch.OutOfMemoryError:
            raise ValueError(
                f"the GPU has too little memory for a batch of {len(prompts)}; try a smaller one"
            ) from None

    @torch.no_grad()
    def pictures(self, codes: Tensor) -> list[Image.Image]:
        """Codes [B, T, F] -> B RGB images. The image tokenizer runs in float32."""
        return to_images(self.image_tokenizer.decode(codes.to(self.device)))

    def images(
        self,
        prompts: Sequence[str | int],
        seeds: Sequence[int],
        sampling: SamplerSettings | None = None,
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


def save_png(image: Image.Image, path: Path, **text: object) -> None:
    """Write a PNG file atomically, with text chunks that image viewers can show."""
    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, str(value))
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG", pnginfo=info)
