"""Generate a suite's images in GenEval's layout: OUT/NNNNN/metadata.jsonl and OUT/NNNNN/samples/00000.png.

Resumable: OUT/generation.json says which checkpoint and settings the images come from, and images that are there
already are kept when it agrees. Under a launcher (RANK and WORLD_SIZE in the environment) every rank makes its share.
Nothing here imports torch before a checkpoint is loaded, which takes seconds: mistakes in a command come to light before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from eval.layout import RECORD, image_path, read_record
from mmtensorar.files import write_text
from mmtensorar.sampling.settings import LOADING, SAMPLING, given_settings, without_removed

if TYPE_CHECKING:
    from mmtensorar.pipeline import Generator
    from mmtensorar.recipe import SamplerSettings

# Two runs that differ only in these make the same images, up to rounding; prompts_sha256 tells other prompts.
FREE = ("checkpoint", "num_prompts", "batch_size", "device", "attn_implementation")


def image_seed(seed: int, prompt_index: int, image_index: int) -> int:
    """The 63-bit seed of one image; models compared under one seed share their random numbers."""
    return int(
        np.random.SeedSequence((seed, prompt_index, image_index)).generate_state(1, np.uint64)[0]
        >> np.uint64(1)
    )


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def scores() -> bool:
    """Is it this process that scores? Under a launcher the first rank does, when all images are there."""
    return rank() == 0


def wait_for_all(out: Path, num_prompts: int, num_images: int) -> None:
    """Return when the images of all ranks are there. A rank that fails is noticed by the launcher, which ends the others."""
    places = ((prompt, image) for prompt in range(num_prompts) for image in range(num_images))
    told = False
    for place in places:
        while not image_path(out, *place).is_file():
            if not told:
                print(f"waiting for the other ranks' images in {out}", file=sys.stderr, flush=True)
                told = True
            time.sleep(1)


def load(options: argparse.Namespace) -> Generator:
    """The generator of --ckpt, on the GPU that a launcher gives this rank. Raises ValueError like Generator.load."""
    from mmtensorar.pipeline import Generator

    loading = {name: getattr(options, name) for name in LOADING}
    if options.device is None and "LOCAL_RANK" in os.environ:
        import torch

        loading["device"] = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    return Generator.load(options.ckpt, **loading)


def generate_into(
    options: argparse.Namespace, generator: Generator, suite: str, prompts: Sequence[dict], num_images: int
) -> Path:
    """`generate` as a command's options ask for it: ckpt, out, seed and those of mmtensorar.sampling.settings.

    Returns the folder: out, or runs/eval/NAME of the checkpoint's run; on the rank that scores when all images are there.
    """
    out = options.out or Path("runs/eval") / generator.recipe.run.name
    sampling = generator.sampling(**given_settings(options))
    numbers = dict(num_images=num_images, seed=options.seed, batch_size=options.batch_size)
    made = generate(generator, options.ckpt, suite, prompts, out, sampling, **numbers)
    print(f"{made} images made in {out}", flush=True)
    if scores():
        wait_for_all(out, len(prompts), num_images)
    return out


def check_numbers(options: argparse.Namespace, **least: int) -> None:
    """Raise ValueError for an option that is given and below its least value."""
    for name, number in least.items():
        value = getattr(options, name)
        if value is not None and value < number:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; expected {number} or more")


def ignored(options: argparse.Namespace, names: Sequence[str] = ()) -> None:
    """Say on stderr which of the options given have no effect on images that are there already."""
    for name in (*names, *SAMPLING, *(name for name in LOADING if name != "device")):
        if getattr(options, name) is not None:
            print(f"note: --{name.replace('_', '-')} has no effect with --images", file=sys.stderr)


def generate(
    generator: Generator,
    ckpt: Path,
    suite: str,
    prompts: Sequence[dict],
    out: Path,
    sampling: SamplerSettings,
    *,
    num_images: int,
    seed: int,
    batch_size: int,
) -> int:
    """Make the images of this rank that are missing in out; returns how many were made.

    prompts: GenEval metadata, or any object with the text, or class number, under "prompt". Raises ValueError when out holds
    images of another checkpoint, other settings or other prompts, or images of unknown origin.
    """
    from mmtensorar.pipeline import save_png

    settings = {
        "checkpoint": str(ckpt),
        "checkpoint_sha256": hashlib.sha256((Path(ckpt) / "checkpoint.json").read_bytes()).hexdigest(),
        "suite": suite,
        "num_prompts": len(prompts),
        "prompts_sha256": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        "num_images": num_images,
        "seed": seed,
        "sampling": sampling.model_dump(mode="json"),
        "window": generator.model.window,
        "batch_size": batch_size,
        **generator.runs_as(),
    }
    out.mkdir(parents=True, exist_ok=True)
    claim(out, settings)
    work = [(prompt, image) for prompt in range(len(prompts)) for image in range(num_images)]
    work = work[rank() :: int(os.environ.get("WORLD_SIZE", 1))]
    # Whole batches, also when some of their images are there: padding depends on the batch, and a resumed run
    # should make the images that an uninterrupted one makes.
    batches = [work[start : start + batch_size] for start in range(0, len(work), batch_size)]
    batches = [batch for batch in batches if not all(image_path(out, *place).is_file() for place in batch)]
    made = 0
    with tqdm(
        total=sum(map(len, batches)),
        unit="image",
        desc=f"generating in {out}",
        file=sys.stderr,
        disable=rank() > 0,
    ) as bar:
        for batch in batches:
            texts = [prompts[prompt]["prompt"] for prompt, _ in batch]
            seeds = [image_seed(seed, *place) for place in batch]
            decoded = generator.decode(texts, seeds, sampling)
            for place, image_seed_, image in zip(
                batch, seeds, generator.pictures(decoded.codes), strict=True
            ):
                path = image_path(out, *place)
                if not path.is_file():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    metadata = prompts[place[0]]
                    write_text(path.parent.parent / "metadata.jsonl", json.dumps(metadata) + "\n")
                    save_png(image, path, prompt=metadata["prompt"], seed=image_seed_)
                    made += 1
            bar.update(len(batch))
    return made


def claim(out: Path, settings: dict) -> None:
    """Record the settings in out, or raise ValueError when it holds images that they did not make."""
    path = out / RECORD
    settings = json.loads(json.dumps(settings))  # tuples come back from the record as lists
    if not path.is_file():
        if any(item.name.isdigit() for item in out.iterdir()):
            raise ValueError(
                f"{out} holds images but no {RECORD}, so their origin is unknown; choose another --out"
            )
        write_text(path, json.dumps(settings, indent=2) + "\n")
        return
    found = read_record(out)
    found["sampling"] = without_removed(found.get("sampling") or {})
    changed = [
        f"{key} {found.get(key)!r} there, {value!r} now"
        for key, value in settings.items()
        if key not in FREE and found.get(key) != value
    ]
    if changed:
        raise ValueError(
            f"{out} holds images of another run ({'; '.join(changed)}); choose another --out or delete it"
        )
