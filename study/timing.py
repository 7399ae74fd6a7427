"""The time of a training step of each arm, alone on the machine.

The arms take turns, so that a slow minute slows them all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

from mmtensorar import backbones
from mmtensorar.data import loader
from mmtensorar.recipe import Recipe
from mmtensorar.training import distributed
from mmtensorar.training import engine as engines
from study import job
from study.commands import ROOT
from study.grid import Grid


def steps_in_turns(grid: Grid, names: Sequence[str], out: Path, rounds: int) -> dict[str, list[float]]:
    """Arm -> seconds of forward, backward and update in each round, on the same
    samples.

    A first round is not counted. Models and optimizers of all arms are in memory at
    once.

    Args:
        grid: the grid.
        names: the arms to time.
        out: the study's folder.
        rounds: steps of each arm.
    """
    before, steps, seconds = dict(os.environ), {}, {name: [] for name in names}
    _, _, device = distributed.start_process_group(0)
    try:
        for name in names:
            recipe = Recipe.load(
                ROOT / grid.recipe, [*job.recipe_of(grid, name, 0, out), "optim.warmup_steps=0"]
            )
            if not steps:
                encoder = backbones.caption_encoder(recipe.backbone)
                batch = next(loader.stream(recipe, encoder, rank=0, world_size=1))
            steps[name] = _step(engines.start(recipe, 1, device), batch, device)
        for number in range(rounds + 1):
            for name in names:
                began = time.perf_counter()
                steps[name](number)
                if number:
                    seconds[name].append(time.perf_counter() - began)
    finally:
        distributed.stop_process_group()
        # Otherwise a process that is started later would use this one's port.
        os.environ.clear()
        os.environ.update(before)
    return seconds


def _step(engine, batch: loader.Batch, device: torch.device) -> Callable[[int], None]:
    condition = batch.condition.to(device)
    codes, uncond = batch.codes.to(device), batch.uncond.to(device)

    def step(number: int) -> None:
        generator = torch.Generator(device).manual_seed(number)
        engine.backward(engine(codes, condition, uncond, generator, (0, len(codes))).loss)
        engine.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def relative_to_control(grid: Grid, seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Arm -> median seconds of a step, and median ratio to the control's in the same
    round.
    """
    control = seconds[grid.control]
    return {
        name: {
            "seconds": round(median(of_arm), 4),
            "over_control": round(median(a / b for a, b in zip(of_arm, control, strict=True)), 3),
        }
        for name, of_arm in seconds.items()
    }
