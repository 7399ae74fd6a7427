"""One arm with one seed: train it, then measure the model. A process of its own, so that several run side by side.

What is measured, of pictures by each sampling and of teacher-forced validation samples, is one line each of the results:

    score          share of pictures that show what is asked for: of each group, and their mean (overall)
    verdicts       prompt -> a digit per picture, 1 where it is right, from which intervals are drawn
    frechet        Frechet distance to validation pictures, in the world's features
    revised        share of tokens that changed at each offset while sampling
    passes_per_image, seconds_per_image    through the backbone, and of sampling without decoding the picture
    probe          nats per token and accuracy of the likeliest at each offset, given drafts that are true, the model's own, or none
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import numpy as np
import torch

from eval.fid.score import frechet_distance, statistics
from eval.harness import image_seed
from mmtensorar.data import loader
from mmtensorar.files import write_text
from mmtensorar.model.tensorar import TensorAR
from mmtensorar.model.windows import slide
from mmtensorar.pipeline import Generator
from mmtensorar.recipe import Recipe
from mmtensorar.sampling.trace import revised_per_offset
from mmtensorar.training.run_log import read_log
from study import start, worlds
from study.commands import ROOT, run
from study.grid import BASE, ON_ALL, Grid

BATCH_SIZE = 40  # pictures at a time, unless a sampling says another number
ROUNDS = 3  # of drafting anew from the own drafts of the round before


def recipe_of(grid: Grid, name: str, seed: int, out: Path) -> list[str]:
    """The overrides that make the grid's recipe that of an arm and seed; data and initial codec depend on the seed alone."""
    train, _ = worlds.load(grid.world).sets(out / "data")
    base = start.folder(grid, out)
    overrides = [
        *grid.arms[name].settings,
        f"run.name={name}-{seed}",
        f"run.out={out / 'runs'}",
        f"run.seed={seed}",
        f"data.shards={train}",
    ]
    overrides += [f"backbone.path={base / 'backbone'}", f"image_tokenizer.path={base / 'image_tokenizer'}"]
    return [*ON_ALL, "zero.stage=0", *overrides]


def train(grid: Grid, name: str, seed: int, out: Path) -> tuple[Path, dict]:
    """The model folder, and what training took. Raises ValueError when it fails."""
    if name == BASE:
        return start.folder(grid, out), {"steps": 0, "train_seconds": 0.0, "step_seconds": None}
    folder = out / "runs" / f"{name}-{seed}"
    overrides = recipe_of(grid, name, seed, out.resolve())
    told = out / f"{name}-{seed}.json"  # of what the run folder holds
    if folder.is_dir() and (not told.is_file() or json.loads(told.read_text(encoding="utf-8")) != overrides):
        shutil.rmtree(folder)
    write_text(told, json.dumps(overrides))
    run("mmtensorar/train.py", grid.recipe, *overrides, "--resume", log=out / f"{name}-{seed}.log")
    rows = read_log(folder / "log.jsonl")
    seconds = [
        sum(row["seconds"].get(part, 0) for part in ("data", "forward", "backward", "step")) for row in rows
    ]
    return folder / "model", {
        "steps": len(rows),
        "train_seconds": sum(seconds),
        "step_seconds": median(seconds),
    }


def fingerprint(base: Path) -> str:
    """Of the weights that all arms start from, and of the image tokenizer's."""
    digest = hashlib.sha256()
    for path in sorted(base.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def probe(model: TensorAR, recipe: Recipe, generator: Generator) -> dict:
    """Nats per token and accuracy at each offset on data.validation; see above. Keys true, own, none; draft_error of own."""
    K, totals, count = model.window, defaultdict(float), 0
    device = generator.device
    for number, num_samples, batch in loader.validation_batches(
        recipe, generator.caption_encoder, rank=0, world_size=1
    ):
        codes, uncond = batch.codes.to(device)[:num_samples], batch.uncond.to(device)[:num_samples]
        condition = type(batch.condition)(*(part.to(device)[:num_samples] for part in batch.condition))
        windows, valid = slide(codes, K)
        clean, seen = windows[:, :-1], valid[:-1]
        blind = seen & (torch.arange(K, device=device) < 1)
        given = {"none": (clean, blind)}
        if K > 1:
            noise = torch.Generator().manual_seed(number)
            drafts, slots = clean, blind
            for _ in range(ROUNDS):
                own = model.own_drafts(drafts, slots, condition, uncond, noise)
                drafts, slots = torch.cat([clean[:, :, :1], own[:, :, 1:]], dim=2), seen
            given |= {"true": (clean, seen), "own": (drafts, seen)}
            wrong = (drafts != clean).any(-1) & seen
            totals["draft_error"] += wrong.sum((0, 1)) / seen.sum(0)
        for name, (inputs, slots) in given.items():
            found = model.score(inputs, slots, codes, condition, uncond)
            totals[f"{name} nats"] += found.loss_per_offset * num_samples
            totals[f"{name} accuracy"] += found.accuracy_per_offset * num_samples
        count += num_samples
    return {name: [round(number, 5) for number in (value / count).tolist()] for name, value in totals.items()}


@torch.no_grad()
def draw(
    grid: Grid, generator: Generator, settings: dict, seed: int, data_folder: Path, reference: np.ndarray
) -> dict:
    """Pictures of all prompts by one sampling, and what they are worth."""
    world = worlds.load(grid.world)
    batch_size = settings.get("batch_size", BATCH_SIZE)
    prompts, sampling = (
        world.prompts(),
        generator.sampling(**{key: value for key, value in settings.items() if key != "batch_size"}),
    )
    work = [(number, image) for number in range(len(prompts)) for image in range(grid.num_images)]
    verdicts, found, revised, seconds, passes = defaultdict(str), [], [], 0.0, 0
    for first in range(0, len(work), batch_size):
        part = work[first : first + batch_size]
        began = time.perf_counter()
        decoded = generator.decode(
            [prompts[number][1] for number, _ in part],
            [image_seed(seed, *place) for place in part],
            sampling,
            keep_trace=True,
        )
        if generator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - began
        passes += decoded.passes * len(part)
        revised.append(revised_per_offset(decoded.trace))
        found.append(world.features(data_folder, generator.image_tokenizer, decoded.codes))
        for (number, _), image in zip(part, generator.pictures(decoded.codes), strict=True):
            verdicts[number] += str(int(world.correct(data_folder, number, [image])[0]))
    groups = defaultdict(list)
    for number, (group, _) in enumerate(prompts):
        groups[group] += map(int, verdicts[number])
    score = {group: sum(each) / len(each) for group, each in groups.items()}
    return {
        "score": {"overall": sum(score.values()) / len(score), **score},
        "verdicts": dict(verdicts),
        "frechet": frechet_distance(statistics(reference), statistics(np.concatenate(found))),
        "revised": np.mean(revised, axis=0).round(5).tolist(),
        "seconds_per_image": seconds / len(work),
        "passes_per_image": passes / len(work),
        "batch_size": batch_size,
    }


def measure(grid: Grid, name: str, seed: int, model_folder: Path, out: Path) -> list[dict]:
    """A row per sampling."""
    generator = Generator.load(model_folder, precision="fp32")  # the same on every device
    world, data_folder = worlds.load(grid.world), out / "data"
    _, validation = world.sets(data_folder)
    recipe = Recipe.load(
        ROOT / grid.recipe,
        [
            f"image_tokenizer.path={model_folder / 'image_tokenizer'}",
            f"data.validation={validation}",
            "train.validate_every=1",
            "data.validation_batch_size=64",
        ],
    )
    batches = loader.validation_batches(recipe, generator.caption_encoder, rank=0, world_size=1)
    codes = [batch.codes[:number].to(generator.device) for _, number, batch in batches]
    reference = np.concatenate(
        [world.features(data_folder, generator.image_tokenizer, each) for each in codes]
    )
    judge = world.judge(data_folder, generator.image_tokenizer)
    probed = probe(generator.model, recipe, generator)
    samplings = {each: grid.made_of(name, each)["sampler"] for each in grid.arms[name].samplings_of(seed)}
    start_of = fingerprint(start.folder(grid, out))
    return [
        {
            "sampling": sampling,
            "made_of": grid.made_of(name, sampling),
            "base": start_of,
            "judge": judge,
            "probe": probed,
            **draw(grid, generator, settings, seed, data_folder, reference),
            **generator.runs_as(),
        }
        for sampling, settings in samplings.items()
    ]


def main(arguments: list[str]) -> int:
    """GRID ARM SEED OUT FILE: rows of results into FILE, as JSON."""
    grid_path, name, seed, out, target = arguments
    grid, torch_threads = Grid.load(grid_path), torch.get_num_threads()
    folder, took = train(grid, name, int(seed), Path(out))
    rows = measure(grid, name, int(seed), folder, Path(out))
    facts = {
        "world": grid.world,
        "arm": name,
        "seed": int(seed),
        "settings": grid.arms[name].settings,
        **took,
    }
    facts |= {"threads": torch_threads, "torch": torch.__version__}
    Path(target).write_text("".join(json.dumps(facts | row) + "\n" for row in rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
