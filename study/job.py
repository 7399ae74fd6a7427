"""One arm with one seed: train it, then measure the model.

A job is a process, so several can run at once.

Every sampling of an arm is one line of the results. It holds, among others:

    score                share of pictures that show what the prompt asks for: per group, and overall (the
                         mean of the groups)
    verdicts             prompt -> a digit per picture, 1 where it is right, from which intervals are made
    frechet              Frechet distance to validation pictures, in the world's features
    revised              share of tokens that changed at each offset while sampling
    passes_per_image     through the backbone
    seconds_per_image    of sampling, without decoding the picture
    probe                on validation samples with teacher forcing: nats per token, and accuracy of the
                         likeliest token, at each offset, given true drafts, the model's own, or none
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
from mmtensorar.cli import command
from mmtensorar.data import loader
from mmtensorar.files import read_text, write_text
from mmtensorar.model.conditions import Condition
from mmtensorar.model.tensorar import TensorAR
from mmtensorar.model.windows import slide
from mmtensorar.pipeline import Generator
from mmtensorar.recipe import Recipe
from mmtensorar.sampling.trace import revised_per_offset
from mmtensorar.seeds import image_seed
from mmtensorar.training.run_log import read_log
from study import start, worlds
from study.commands import ROOT, run
from study.grid import BASE, ON_ALL, Grid

BATCH_SIZE = 40  # pictures at a time, unless a sampling has its own
ROUNDS = 3  # of drafting, each from the drafts of the round before


def recipe_of(grid: Grid, name: str, seed: int, out: Path) -> list[str]:
    """The overrides that turn the grid's recipe into an arm's; data and first codec
    depend on the seed.
    """
    train, _ = worlds.load(grid.world).sets(out / "data")
    base = start.folder(grid, out)
    return [
        *ON_ALL,
        "zero.stage=0",
        *grid.arms[name].settings,
        f"run.name={name}-{seed}",
        f"run.out={out / 'runs'}",
        f"run.seed={seed}",
        f"data.shards={train}",
        f"backbone.path={base / 'backbone'}",
        f"image_tokenizer.path={base / 'image_tokenizer'}",
    ]


def train(grid: Grid, name: str, seed: int, out: Path) -> tuple[Path, dict]:
    """Train an arm; returns the model folder, and steps, train_seconds and step_seconds
    (the median).

    Raises ValueError when training fails.
    """
    if name == BASE:
        return start.folder(grid, out), {"steps": 0, "train_seconds": 0.0, "step_seconds": None}
    folder = out / "runs" / f"{name}-{seed}"
    overrides = recipe_of(grid, name, seed, out.resolve())
    record = out / f"{name}-{seed}.json"  # the overrides of the run folder
    recorded = json.loads(read_text(record)) if record.is_file() else None
    if folder.is_dir() and recorded != overrides:
        shutil.rmtree(folder)
    write_text(record, json.dumps(overrides))
    run("mmtensorar/train.py", grid.recipe, *overrides, "--resume", log=out / f"{name}-{seed}.log")
    rows = read_log(folder / "log.jsonl")
    timed = ("data", "forward", "backward", "step")
    seconds = [sum(row["seconds"].get(name, 0) for name in timed) for row in rows]
    took = {"steps": len(rows), "train_seconds": sum(seconds), "step_seconds": median(seconds)}
    return folder / "model", took


def fingerprint(base: Path) -> str:
    """A hash of the weights that all arms start from, and of the image tokenizer's."""
    digest = hashlib.sha256()
    for path in sorted(base.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def probe(model: TensorAR, recipe: Recipe, generator: Generator) -> dict:
    """Nats per token and accuracy at each offset on data.validation, given three kinds
    of drafts.

    Args:
        model: the trained model.
        recipe: with data.validation.
        generator: with the model's caption encoder and device.

    Returns lists of one number per offset: "KIND nats" and "KIND accuracy" for KIND
    none (no drafts in view), own (drafts that the model sampled) and true, and
    draft_error, the share of own drafts that are wrong. K=1 has none only.
    """
    K, totals, count = model.window, defaultdict(float), 0
    device = generator.device
    for number, num_samples, batch in loader.validation_batches(
        recipe, generator.caption_encoder, rank=0, world_size=1
    ):
        codes, uncond = batch.codes.to(device)[:num_samples], batch.uncond.to(device)[:num_samples]
        condition = Condition(*(tensor[:num_samples] for tensor in batch.condition.to(device)))
        windows, valid = slide(codes, K)
        clean, in_view = windows[:, :-1], valid[:-1]
        blind = in_view & (torch.arange(K, device=device) < 1)
        inputs = {"none": (clean, blind)}
        if K > 1:
            noise = torch.Generator().manual_seed(number)
            drafts, slots = clean, blind
            for _ in range(ROUNDS):
                sampled = model.sample_self_drafts(drafts, slots, condition, uncond, noise)
                drafts, slots = torch.cat([clean[:, :, :1], sampled[:, :, 1:]], dim=2), in_view
            inputs |= {"true": (clean, in_view), "own": (drafts, in_view)}
            wrong = (drafts != clean).any(-1) & in_view
            totals["draft_error"] += wrong.sum((0, 1)) / in_view.sum(0)
        for name, (windows, slots) in inputs.items():
            scored = model.score(windows, slots, codes, condition, uncond)
            totals[f"{name} nats"] += scored.loss_per_offset * num_samples
            totals[f"{name} accuracy"] += scored.accuracy_per_offset * num_samples
        count += num_samples
    return {name: [round(number, 5) for number in (value / count).tolist()] for name, value in totals.items()}


@torch.no_grad()
def draw(
    grid: Grid, generator: Generator, settings: dict, seed: int, data_folder: Path, reference: np.ndarray
) -> dict:
    """Sample pictures of all prompts and score them.

    Args:
        grid: the grid.
        generator: the model.
        settings: of the sampler, and batch_size.
        seed: of the pictures.
        data_folder: of the world.
        reference: features of validation pictures, [N, C].

    Returns part of a row: see the top of the file.
    """
    world = worlds.load(grid.world)
    batch_size = settings.get("batch_size", BATCH_SIZE)
    prompts = world.prompts()
    sampling = generator.sampling(**{key: settings[key] for key in settings if key != "batch_size"})
    work = [(number, image) for number in range(len(prompts)) for image in range(grid.num_images)]
    verdicts, features, revised, seconds, passes = defaultdict(str), [], [], 0.0, 0
    for first in range(0, len(work), batch_size):
        batch = work[first : first + batch_size]
        texts = [prompts[number][1] for number, _ in batch]
        seeds = [image_seed(seed, *numbers) for numbers in batch]
        began = time.perf_counter()
        decoded = generator.decode(texts, seeds, sampling, keep_trace=True)
        if generator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - began
        passes += sum(decoded.passes)
        revised.append(revised_per_offset(decoded.trace))
        features.append(world.features(data_folder, generator.image_tokenizer, decoded.codes))
        for (number, _), image in zip(batch, generator.pictures(decoded.codes), strict=True):
            verdicts[number] += str(int(world.correct(data_folder, number, [image])[0]))
    groups = defaultdict(list)
    for number, (group, _) in enumerate(prompts):
        groups[group] += map(int, verdicts[number])
    score = {group: sum(right) / len(right) for group, right in groups.items()}
    return {
        "score": {"overall": sum(score.values()) / len(score), **score},
        "verdicts": dict(verdicts),
        "frechet": frechet_distance(statistics(reference), statistics(np.concatenate(features))),
        "revised": np.mean(revised, axis=0).round(5).tolist(),
        "seconds_per_image": seconds / len(work),
        "passes_per_image": passes / len(work),
        "batch_size": batch_size,
    }


def measure(grid: Grid, name: str, seed: int, model_folder: Path, out: Path) -> list[dict]:
    """A row for each sampling of an arm's trained model."""
    generator = Generator.load(model_folder, precision="fp32")  # the same on every device
    world, data_folder = worlds.load(grid.world), out / "data"
    _, validation = world.sets(data_folder)
    settings = [
        f"image_tokenizer.path={model_folder / 'image_tokenizer'}",
        f"data.validation={validation}",
        "train.validate_every=1",
        "data.validation_batch_size=64",
    ]
    recipe = Recipe.load(ROOT / grid.recipe, settings)
    batches = loader.validation_batches(recipe, generator.caption_encoder, rank=0, world_size=1)
    all_codes = [batch.codes[:number].to(generator.device) for _, number, batch in batches]
    image_tokenizer = generator.image_tokenizer
    reference = np.concatenate([world.features(data_folder, image_tokenizer, codes) for codes in all_codes])
    common = {
        "base": fingerprint(start.folder(grid, out)),
        "judge": world.judge(data_folder, image_tokenizer),
        "probe": probe(generator.model, recipe, generator),
        **generator.runs_as(),
    }
    rows = []
    for sampling in grid.arms[name].samplings_of(seed):
        made_of = grid.made_of(name, sampling)
        drawn = draw(grid, generator, made_of["sampler"], seed, data_folder, reference)
        rows.append({"sampling": sampling, "made_of": made_of, **drawn, **common})
    return rows


@command
def main(arguments: list[str] | None = None) -> int:
    """GRID ARM SEED OUT FILE: train, measure, and write rows of results into FILE, as
    JSON lines.
    """
    grid_path, name, seed_text, out, target = sys.argv[1:] if arguments is None else arguments
    grid, seed, num_threads = Grid.load(grid_path), int(seed_text), torch.get_num_threads()
    folder, took = train(grid, name, seed, Path(out))
    rows = measure(grid, name, seed, folder, Path(out))
    facts = {
        "world": grid.world,
        "arm": name,
        "seed": seed,
        "settings": grid.arms[name].settings,
        **took,
        "threads": num_threads,
        "torch": torch.__version__,
    }
    write_text(Path(target), "".join(json.dumps(facts | row) + "\n" for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
