"""Captions, or class numbers, to images with a consolidated checkpoint.

    python -m mmtensorar.generate --ckpt FOLDER --prompt "a red circle" [--prompt ...] --num-images 4 --out out/
    python -m mmtensorar.generate --ckpt FOLDER --class 207 360 --num-images 4 --out out/

Image j of a prompt has seed --seed + j. The output folder receives {number}_{seed}.png and one line per image in
prompts.jsonl; a folder in use is added to, nothing in it is replaced. --trace adds, per image, every window
(.windows.safetensors) and the picture as it stood at each revision, first to final, in one strip (.revisions.png).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from mmtensorar.pipeline import Generator, Sampling, check_seed, revisions, save_png
from mmtensorar.sampling.options import (
    LOADING,
    SAMPLING,
    add_generation,
    at_least_1,
)

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
            check_seed(seed)
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
