"""The model that all arms of a grid start from: one that ships, or one that is made first, from nothing, of the world's pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from mmtensorar.backbones import llamagen
from mmtensorar.data.shards import Manifest
from mmtensorar.files import write_text
from study import worlds
from study.commands import ROOT, run
from study.grid import ON_ALL, Grid


def folder(grid: Grid, out: Path) -> Path:
    """The checkpoint folder of a grid's base."""
    return out.resolve() / "base" / "model" if grid.base is None else ROOT / grid.base


def prepare(grid: Grid, out: Path) -> None:
    """Make what is missing of the world's shards, their codes, and the base. Raises ValueError when it fails."""
    world = worlds.load(grid.world)
    if grid.from_nothing is not None:
        told, settings = out / "from_nothing.json", grid.from_nothing.model_dump(mode="json")
        if told.is_file() and json.loads(told.read_text(encoding="utf-8")) != json.loads(
            json.dumps(settings)
        ):
            raise ValueError(
                f"{out}: image tokenizer and base in it were made with another from_nothing ({told}); choose another --out"
            )
        out.mkdir(parents=True, exist_ok=True)
        write_text(told, json.dumps(settings, indent=1) + "\n")
    world.prepare(out / "data")
    sets = [path.resolve() for path in world.sets(out / "data")]
    image_tokenizer = folder(grid, out) / "image_tokenizer"
    if grid.from_nothing is not None:
        image_tokenizer = out.resolve() / "image_tokenizer"
        if not (image_tokenizer / "config.json").is_file():
            recipe = out.resolve() / "image_tokenizer.yaml"
            recipe.write_text(grid.from_nothing.image_tokenizer.dump(), encoding="utf-8")
            places = [f"shards={sets[0]}", f"out={image_tokenizer}.partial"]
            run("-m", "study.train_image_tokenizer", recipe, *places, log=out / "image_tokenizer.log")
            Path(f"{image_tokenizer}.partial").rename(image_tokenizer)
    for path in sets:
        if Manifest.read(path).codes is None:
            run("data_tools/encode_codes.py", path, "--image-tokenizer", image_tokenizer)
    if grid.from_nothing is not None and not folder(grid, out).is_dir():
        start = out.resolve() / "start"
        torch.manual_seed(0)
        llamagen.LlamaGenBackbone(grid.from_nothing.backbone).save_pretrained(start)
        paths = [
            f"backbone.path={start}",
            f"image_tokenizer.path={image_tokenizer}",
            f"data.shards={sets[0]}",
        ]
        named = [
            "run.name=base",
            f"run.out={out.resolve()}",
            "zero.stage=0",
            "tensorar.window=1",
            "train.save_every=100",
        ]
        run(
            "mmtensorar/train.py",
            grid.recipe,
            *ON_ALL,
            *paths,
            *named,
            *grid.from_nothing.settings,
            "--resume",
            log=out / "base.log",
        )
        shutil.rmtree(start)
