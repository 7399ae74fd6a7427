"""Generate images from captions or class numbers, with a model folder.

    mmtensorar generate --ckpt FOLDER --prompt "a red circle" --num-images 4 --out out/
    mmtensorar generate --ckpt FOLDER --class 207 360 --num-images 4 --out out/

Image j of a prompt has seed --seed + j. The output folder receives {number}_{seed}.png
and one line per image in prompts.jsonl. If the folder holds images already, new ones are
added and none is replaced. --trace also writes, for each image, every window
(.windows.safetensors) and the image after each revision, first to final, in one strip
(.revisions.png).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from mmtensorar.checkpoints.index import read_index
from mmtensorar.cli import Parser, command
from mmtensorar.sampling.settings import LOADING, add_generation, at_least_1, given_settings
from mmtensorar.seeds import check_seed
from mmtensorar.words import counted

if TYPE_CHECKING:
    from torch import Tensor

    from mmtensorar.pipeline import Generator

Prompt = str | int  # a caption, or a class number


def read_prompts(options: argparse.Namespace) -> list[str] | list[int]:
    """The class numbers of --class, or the prompts of --prompt and --prompts-file.

    Empty lines are skipped. Raises ValueError when nothing is given, or both prompts and
    class numbers.
    """
    prompts = list(options.prompt)
    if options.classes:
        if prompts or options.prompts_file is not None:
            raise ValueError("--class and prompts were given; a model takes one or the other")
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


def origin_of(prompt: Prompt, seed: int) -> dict[str, Prompt]:
    """Prompt or class, and seed of an image, as recorded in prompts.jsonl and in its file."""
    return {"prompt" if isinstance(prompt, str) else "class": prompt, "seed": seed}


def write_images(generator: Generator, prompts: Sequence[Prompt], options: argparse.Namespace) -> list[Path]:
    """Generate --num-images for each prompt into --out; returns the image files."""
    from mmtensorar.pipeline import save_png

    generator.check(prompts)
    sampling = generator.sampling(**given_settings(options))
    print(", ".join(f"{key} {value}" for key, value in generator.runs_as().items()), file=sys.stderr)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    first = 1 + max((int(path.name[:5]) for path in out.glob("[0-9][0-9][0-9][0-9][0-9]_*.png")), default=-1)
    work = [(prompt, options.seed + image) for prompt in prompts for image in range(options.num_images)]
    made_by = {
        "settings": sampling.model_dump(mode="json")
        | generator.runs_as()
        | {"batch_size": options.batch_size},
        "window": generator.model.window,
        "checkpoint": str(options.ckpt),
    }
    paths = []
    num_tokens = generator.model.backbone.num_tokens
    progress = tqdm(
        total=len(work) * num_tokens, unit="token", desc=counted(len(work), "image"), file=sys.stderr
    )
    with (out / "prompts.jsonl").open("a", encoding="utf-8") as log, progress:
        for start in range(0, len(work), options.batch_size):
            batch = work[start : start + options.batch_size]

            def update(done: int, total: int, start: int = start, rows: int = len(batch)) -> None:
                progress.update(start * total + done * rows - progress.n)

            decoded = generator.decode(
                [prompt for prompt, _ in batch],
                [seed for _, seed in batch],
                sampling,
                keep_trace=options.trace,
                progress=update,
            )
            for row, image in enumerate(generator.pictures(decoded.codes)):
                prompt, seed = batch[row]
                path = out / f"{first + start + row:05d}_{seed}.png"
                origin = origin_of(prompt, seed)
                save_png(image, path, **origin)
                if decoded.trace is not None:
                    write_trace(generator, decoded.trace[row], path, origin)
                log.write(json.dumps({"file": path.name, **origin, **made_by}, ensure_ascii=False) + "\n")
                log.flush()
                paths.append(path)
    return paths


def write_trace(generator: Generator, windows: Tensor, path: Path, origin: dict[str, Prompt]) -> None:
    """Write an image's windows [T, K, F] and its strip of revisions next to its file.

    Args:
        path: the image file.
        origin: see `origin_of`; both files record it.
    """
    from PIL import Image
    from safetensors.torch import save_file

    from mmtensorar.pipeline import save_png
    from mmtensorar.sampling.trace import revisions

    metadata = {key: str(value) for key, value in origin.items()}
    metadata["windows"] = "[T, K, F]; windows[t, j] is token t + j at step t"
    save_file({"windows": windows.cpu().contiguous()}, path.with_suffix(".windows.safetensors"), metadata)
    images = generator.pictures(revisions(windows[None])[0])
    width, height = images[0].size
    gap = 2
    strip = Image.new("RGB", (len(images) * (width + gap) - gap, height), "white")
    for revision, image in enumerate(images):
        strip.paste(image, (revision * (width + gap), 0))
    save_png(strip, path.with_suffix(".revisions.png"), **origin)


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m mmtensorar.generate",
        description="Generate images from captions or class numbers.",
        example='--ckpt recipes/tiny/weights/base --prompt "a red circle" --out out/',
    )
    parser.add_argument("--ckpt", type=Path, required=True, help="model folder, such as runs/NAME/model")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts-file", type=Path, help="text file with one prompt per line")
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
    parser.add_argument("--out", type=Path, default=Path("out"), help="output folder (default out)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of each prompt's first image; the next ones count up (default 0)"
    )
    parser.add_argument("--trace", action="store_true", help="also write each image's windows and revisions")
    add_generation(parser)
    return parser.parse_args(arguments)


@command
def main(arguments: list[str] | None = None) -> int:
    options = read_options(arguments)
    prompts = read_prompts(options)
    for seed in (options.seed, options.seed + options.num_images - 1):
        check_seed(seed)
    read_index(options.ckpt)
    # Imported after the checks, since torch takes seconds.
    from mmtensorar.pipeline import Generator

    generator = Generator.load(options.ckpt, **{name: getattr(options, name) for name in LOADING})
    try:
        paths = write_images(generator, prompts, options)
    except KeyboardInterrupt:
        print(f"\nstopped; {options.out / 'prompts.jsonl'} lists the images made so far", file=sys.stderr)
        return 130
    print(f"{counted(len(paths), 'image')} in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
