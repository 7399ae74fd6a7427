"""Captions, or class numbers, to images with a consolidated checkpoint.

    python -m mmtensorar.generate --ckpt FOLDER --prompt "a red circle" [--prompt ...] --num-images 4 --out out/
    python -m mmtensorar.generate --ckpt FOLDER --class 207 360 --num-images 4 --out out/

From Python:

    generator = Generator.load("runs/NAME/model")
    images = generator.images(["a red circle", "a blue star"], seeds=[0, 1])
    images = generator.images([207, 360], seeds=[0, 1])      of a class-conditional model

Image j of a prompt has seed --seed + j. The output folder receives {number}_{seed}.png and one line per image in
prompts.jsonl; a folder in use is added to, nothing in it is replaced. --trace adds, per image, every window
(.windows.safetensors) and the picture as it stood at each revision, first to final, in one strip (.revisions.png).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from mmtensorar import checkpoint, devices
from mmtensorar.captions import ClassNumbers, T5Features
from mmtensorar.decode import Decoded, Sampler, decode
from mmtensorar.image_tokenizers import to_images
from mmtensorar.options import LOADING, SAMPLING, add_generation, at_least_1

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

    def __init__(self, loaded: checkpoint.Loaded, *, precision: str = "fp32"):
        self.model, self.image_tokenizer, self.caption_encoder, self.recipe = loaded
        if self.image_tokenizer is None:
            raise ValueError(
                "the checkpoint has no image tokenizer: convert it again, with --image-tokenizer"
            )
        self.device = next(self.model.parameters()).device
        if isinstance(self.caption_encoder, T5Features):
            self.caption_encoder.device = self.device
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
        return cls(checkpoint.load(folder, chosen, dtype, attn_implementation=attention), precision=precision)

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
        if isinstance(self.caption_encoder, ClassNumbers):
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
            _check_seed(seed)
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


def _check_seed(seed: int) -> None:
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
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    image.save(partial, "PNG", pnginfo=info)
    os.replace(partial, path)


# ---- command line --------------------------------------------------------------------------------


def sampling_from(generator: Generator, options: argparse.Namespace) -> Sampling:
    """The sampling that a command's options ask for; an option that is None is the recipe's."""
    return generator.sampling(**{name: getattr(options, name) for name in SAMPLING})


def _prompts(options: argparse.Namespace) -> list[str] | list[int]:
    """Numbers of --class; or prompts of --prompt, then those of --prompts-file, whose empty lines are passed over."""
    prompts = list(options.prompt)
    if options.classes:
        if prompts or options.prompts_file is not None:
            raise ValueError("--class and prompts were given; a model takes the one or the other")
        return options.classes
    if options.prompts_file is not None:
        try:
            lines = options.prompts_file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"{options.prompts_file}: not UTF-8") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError("no prompts: give --prompt TEXT or --prompts-file FILE, or --class NUMBER")
    return prompts


def _named(prompt: str | int) -> dict[str, str | int]:
    """A prompt as it stands in prompts.jsonl and in the files."""
    return {"prompt" if isinstance(prompt, str) else "class": prompt}


def write_images(
    generator: Generator, prompts: Sequence[str | int], options: argparse.Namespace
) -> list[Path]:
    """Generate --num-images per prompt into --out; returns the pictures' paths."""
    generator.check(prompts)
    sampling = sampling_from(generator, options)
    print(", ".join(f"{key} {value}" for key, value in generator.runs_as().items()), file=sys.stderr)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    first = 1 + max((int(path.name[:5]) for path in out.glob("[0-9][0-9][0-9][0-9][0-9]_*.png")), default=-1)
    work = [(prompt, options.seed + image) for prompt in prompts for image in range(options.num_images)]
    paths = []
    num_tokens = generator.model.backbone.num_tokens
    with (
        (out / "prompts.jsonl").open("a", encoding="utf-8") as log,
        tqdm(total=len(work) * num_tokens, unit="token", desc=f"{len(work)} images", file=sys.stderr) as bar,
    ):
        for start in range(0, len(work), options.batch_size):
            batch = work[start : start + options.batch_size]

            def tell(done: int, total: int, start: int = start, rows: int = len(batch)) -> None:
                bar.update(start * total + done * rows - bar.n)

            decoded = generator.decode(
                [prompt for prompt, _ in batch],
                [seed for _, seed in batch],
                sampling,
                keep_trace=options.trace,
                progress=tell,
            )
            for row, image in enumerate(generator.pictures(decoded.codes)):
                prompt, seed = batch[row]
                path = out / f"{first + start + row:05d}_{seed}.png"
                named = _named(prompt) | {"seed": seed}
                save_png(image, path, **named)
                if decoded.trace is not None:
                    write_trace(generator, decoded.trace[row], path, **named)
                line = {
                    "file": path.name,
                    **named,
                    "settings": asdict(sampling) | generator.runs_as() | {"batch_size": options.batch_size},
                    "window": generator.model.window,
                    "checkpoint": str(options.ckpt),
                }
                log.write(json.dumps(line, ensure_ascii=False) + "\n")
                log.flush()
                paths.append(path)
    return paths


def write_trace(generator: Generator, windows: Tensor, path: Path, **named: object) -> None:
    """Next to an image's path: its windows [T, K, F], and the strip of its revisions. named: see _named; the seed."""
    metadata = {key: str(value) for key, value in named.items()}
    metadata["windows"] = "[T, K, F]; windows[t, j] is token t + j at step t"
    save_file({"windows": windows.cpu().contiguous()}, path.with_suffix(".windows.safetensors"), metadata)
    pictures = generator.pictures(revisions(windows[None])[0])
    width, height = pictures[0].size
    gap = 2
    strip = Image.new("RGB", (len(pictures) * (width + gap) - gap, height), "white")
    for place, picture in enumerate(pictures):
        strip.paste(picture, (place * (width + gap), 0))
    save_png(strip, path.with_suffix(".revisions.png"), **named)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mmtensorar.generate", description="Generate images from captions or class numbers."
    )
    parser.add_argument(
        "--ckpt", type=Path, required=True, help="consolidated checkpoint, such as runs/NAME/model"
    )
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts-file", type=Path, help="one prompt a line")
    parser.add_argument(
        "--class",
        dest="classes",
        type=int,
        nargs="+",
        action="extend",
        metavar="NUMBER",
        help="class numbers, instead of prompts, for a class-conditional model",
    )
    parser.add_argument("--num-images", type=at_least_1, default=1, help="per prompt (default 1)")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument(
        "--seed", type=int, default=0, help="of each prompt's first image; the next ones count up"
    )
    parser.add_argument("--trace", action="store_true", help="also write each image's windows and revisions")
    add_generation(parser)
    options = parser.parse_args(arguments)
    try:
        prompts = _prompts(options)
        for seed in (options.seed, options.seed + options.num_images - 1):
            _check_seed(seed)
        generator = Generator.load(options.ckpt, **{name: getattr(options, name) for name in LOADING})
        paths = write_images(generator, prompts, options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; {options.out / 'prompts.jsonl'} lists the images made so far", file=sys.stderr)
        return 130
    print(f"{len(paths)} images in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
