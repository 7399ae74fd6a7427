"""The model that all arms of a grid start from: shipped, or trained from nothing on the
world's pictures.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from mmtensorar.backbones import llamagen
from mmtensorar.data.shards import Manifest
from mmtensorar.files import read_text, write_text
from study import worlds
from study.commands import ROOT, run
from study.grid import ON_ALL, FromNothing, Grid


def folder(grid: Grid, out: Path) -> Path:
    """The model folder of a grid's base."""
    return out.resolve() / "base" / "model" if grid.base is None else ROOT / grid.base


def prepare(grid: Grid, out: Path) -> None:
    """Make what is missing of the world's shards, their codes, the image tokenizer and
    the base.

    Raises ValueError when that fails, or when something there was made with other
    settings.
    """
    world = worlds.load(grid.world)
    if grid.from_nothing is not None:
        _claim(grid.from_nothing, out)
    world.prepare(out / "data")
    train, validation = (path.resolve() for path in world.sets(out / "data"))
    image_tokenizer = folder(grid, out) / "image_tokenizer"
    if grid.from_nothing is not None:
        image_tokenizer = _train_image_tokenizer(grid.from_nothing, out.resolve(), train)
    for path in (train, validation):
        if Manifest.read(path).codes is None:
            run("data_tools/encode_codes.py", path, "--image-tokenizer", image_tokenizer)
    if grid.from_nothing is not None and not folder(grid, out).is_dir():
        _train_base(grid, grid.from_nothing, out.resolve(), train, image_tokenizer)


def _claim(from_nothing: FromNothing, out: Path) -> None:
    """Record the settings in out. Raises ValueError when it was made with others."""
    record, settings = out / "from_nothing.json", from_nothing.model_dump(mode="json")
    if record.is_file() and json.loads(read_text(record)) != json.loads(json.dumps(settings)):
        raise ValueError(
            f"{out}: its image tokenizer and base were made with another from_nothing ({record}); "
            "choose another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_text(record, json.dumps(settings, indent=1) + "\n")


def _train_image_tokenizer(from_nothing: FromNothing, out: Path, shards: Path) -> Path:
    """The folder of the image tokenizer, trained first if it is missing."""
    image_tokenizer = out / "image_tokenizer"
    if not (image_tokenizer / "config.json").is_file():
        recipe = out / "image_tokenizer.yaml"
        write_text(recipe, from_nothing.image_tokenizer.dump())
        partial = Path(f"{image_tokenizer}.partial")
        paths = [f"shards={shards}", f"out={partial}"]
        run("-m", "study.train_image_tokenizer", recipe, *paths, log=out / "image_tokenizer.log")
        partial.rename(image_tokenizer)
    return image_tokenizer


def _train_base(
    grid: Grid, from_nothing: FromNothing, out: Path, shards: Path, image_tokenizer: Path
) -> None:
    """Train a fresh LlamaGen, plain: OUT/base/model."""
    start = out / "start"
    torch.manual_seed(0)
    llamagen.LlamaGenBackbone(from_nothing.backbone).save_pretrained(start)
    settings = [
        f"backbone.path={start}",
        f"image_tokenizer.path={image_tokenizer}",
        f"data.shards={shards}",
        "run.name=base",
        f"run.out={out}",
        "zero.stage=0",
        "tensorar.window=1",
        "train.save_every=100",
        *from_nothing.settings,
    ]
    run("mmtensorar/train.py", grid.recipe, *ON_ALL, *settings, "--resume", log=out / "base.log")
    shutil.rmtree(start)
