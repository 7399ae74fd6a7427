"""Generate images from captions or class numbers, with a model folder.

    mmtensorar generate --ckpt FOLDER --prompt "a red circle" --num-images 4 --out out/
    mmtensorar generate --ckpt FOLDER --class 207 360 --num-images 4 --out out/

Image j of a prompt has seed --seed + j. The output folder receives {number}_{seed}.png
and one line per image in prompts.jsonl. If the folder holds images already, or another
process writes into it, new ones are added and none is replaced. --trace also writes,
for each image, every window (.windows.safetensors) and the image after each revision,
first to final, in one strip (.revisions.png). Under a launcher (torchrun) every rank
makes its share.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from mmtensorar import ranks
from mmtensorar.checkpoints.index import read_index
from mmtensorar.cli import Parser, command, folder_to_write
from mmtensorar.files import read_lines, temporary_name
from mmtensorar.picture_folder import RECORD, REVISIONS, WINDOWS, PictureFolder
from mmtensorar.sampling.settings import LOADING, add_generation, at_least_1, given_settings
from mmtensorar.seeds import check_seed
from mmtensorar.words import counted

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from mmtensorar.pipeline import Generator

Prompt = str | int  # a caption, or a class number


def read_prompts(options: argparse.Namespace) -> list[str] | list[int]:
    """The class numbers of --class, or the prompts of --prompt and --prompts-file.

    Empty lines are skipped. Raises ValueError when nothing is given, or both prompts
    and class numbers.
    """
    prompts = list(options.prompt)
    if options.classes:
        if prompts or options.prompts_file is not None:
            raise ValueError("--class and prompts were given; a model takes one or the other")
        return options.classes
    if options.prompts_file is not None:
        in_file = [line.strip() for line in read_lines(options.prompts_file) if line.strip()]
        if not in_file:
            raise ValueError(f"{options.prompts_file}: no prompts in it, only empty lines or nothing")
        prompts += in_file
    if not prompts:
        raise ValueError("no prompts: give --prompt TEXT or --prompts-file FILE, or --class NUMBER")
    return prompts


def origin_of(prompt: Prompt, seed: int) -> dict[str, Prompt]:
    """Prompt or class, and seed of an image, as recorded in prompts.jsonl and in its
    file.
    """
    return {"prompt" if isinstance(prompt, str) else "class": prompt, "seed": seed}


def write_images(generator: Generator, prompts: Sequence[Prompt], options: argparse.Namespace) -> list[Path]:
    """Generate --num-images for each prompt into --out, this rank's share; returns the
    image files.
    """
    generator.check(prompts)
    sampling = generator.sampling(**given_settings(options))
    if ranks.is_first():
        print(", ".join(f"{key} {value}" for key, value in generator.runs_as().items()), file=sys.stderr)
    folder = PictureFolder(options.out)
    work = [(prompt, options.seed + image) for prompt in prompts for image in range(options.num_images)]
    # Whole batches: padding depends on the batch, and any number of ranks should make
    # the same images.
    batches = [work[start : start + options.batch_size] for start in range(0, len(work), options.batch_size)]
    batches = batches[ranks.rank() :: ranks.world_size()]
    num_images = sum(map(len, batches))
    made_by = {
        "settings": sampling.model_dump(mode="json")
        | generator.runs_as()
        | {"batch_size": options.batch_size},
        "window": generator.model.window,
        "checkpoint": str(options.ckpt),
    }
    paths, num_passes, seconds = [], 0, 0.0
    num_tokens = generator.model.backbone.num_tokens
    progress = tqdm(
        total=num_images * num_tokens,
        unit="token",
        desc=counted(num_images, "image"),
        file=sys.stderr,
        disable=not ranks.is_first(),
    )
    with progress:
        for batch in batches:

            def update(done: int, total: int, start: int = len(paths), rows: int = len(batch)) -> None:
                progress.update(start * total + done * rows - progress.n)

            began = time.perf_counter()
            decoded = generator.decode(
                [prompt for prompt, _ in batch],
                [seed for _, seed in batch],
                sampling,
                keep_trace=options.trace,
                progress=update,
            )
            images = generator.pictures(decoded.codes)
            seconds, num_passes = seconds + time.perf_counter() - began, num_passes + sum(decoded.passes)
            for row, image in enumerate(images):
                origin = origin_of(*batch[row])
                windows = None if decoded.trace is None else decoded.trace[row]
                made = made_by | {"passes": decoded.passes[row]}
                paths.append(add_image(folder, generator, image, windows, origin, made))
    if paths and ranks.is_first():
        print(
            f"{num_passes / len(paths):.1f} passes a picture of {num_tokens} tokens, "
            f"{len(paths) / seconds:.3g} pictures a second",
            file=sys.stderr,
        )
    return paths


def add_image(
    folder: PictureFolder,
    generator: Generator,
    image: Image.Image,
    windows: Tensor | None,
    origin: dict[str, Prompt],
    made_by: dict,
) -> Path:
    """Add an image, and the trace of its windows, to the folder; returns the image
    file.

    Args:
        windows: [T, K, F], or None without a trace.
        origin: see `origin_of`; every file records it.
        made_by: further entries of the image's line in prompts.jsonl.
    """
    from mmtensorar.pipeline import save_png

    endings = [*([WINDOWS, REVISIONS] if windows is not None else []), ".png"]
    with ExitStack() as stack:
        finished = {ending: stack.enter_context(temporary_name(folder.path)) for ending in endings}
        if windows is not None:
            write_trace(generator, windows, finished[WINDOWS], finished[REVISIONS], origin)
        save_png(image, finished[".png"], **origin)
        return folder.add(finished, int(origin["seed"]), {**origin, **made_by})


def write_trace(
    generator: Generator, windows: Tensor, windows_file: Path, strip_file: Path, origin: dict[str, Prompt]
) -> None:
    """Write an image's windows [T, K, F], and its strip of revisions.

    Both files record the origin.
    """
    from PIL import Image
    from safetensors.torch import save_file

    from mmtensorar.pipeline import save_png
    from mmtensorar.sampling.trace import revisions

    metadata = {key: str(value) for key, value in origin.items()}
    metadata["windows"] = "[T, K, F]; windows[t, j] is token t + j at step t"
    save_file({"windows": windows.cpu().contiguous()}, windows_file, metadata)
    images = generator.pictures(revisions(windows[None])[0])
    width, height = images[0].size
    gap = 2
    strip = Image.new("RGB", (len(images) * (width + gap) - gap, height), "white")
    for revision, image in enumerate(images):
        strip.paste(image, (revision * (width + gap), 0))
    save_png(strip, strip_file, **origin)


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m mmtensorar.generate",
        description="Generate images from captions or class numbers.",
        example='--ckpt recipes/tiny/weights/base --prompt "a red circle" --out out/',
    )
    parser.add_argument("--ckpt", type=Path, required=True, help="model folder, such as runs/NAME/model")
    parser.add_argument("--prompt", type=str, action="append", default=[], help="may be given several times")
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
    parser.add_argument("--out", type=folder_to_write, default=Path("out"), help="folder (default out)")
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

    loading = {name: getattr(options, name) for name in LOADING}
    loading["device"] = ranks.device(options.device)
    generator = Generator.load(options.ckpt, **loading)
    try:
        paths = write_images(generator, prompts, options)
    except KeyboardInterrupt:
        print(f"\nstopped; {options.out / RECORD} lists the images made so far", file=sys.stderr)
        return 130
    by_rank = f", by rank {ranks.rank()} of {ranks.world_size()}" if ranks.world_size() > 1 else ""
    print(f"{counted(len(paths), 'image')} in {options.out}{by_rank}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
