"""Validation during training: loss and accuracy per offset over a whole shard set."""

from __future__ import annotations

from typing import Any

import torch

from mmtensorar.data import loader
from mmtensorar.model.conditions import CaptionEncoder
from mmtensorar.recipe import Recipe
from mmtensorar.seeds import seed_for
from mmtensorar.training.distributed import gather_lists, mean_over_ranks, on_all_ranks


def validate(
    engine: Any, recipe: Recipe, caption_encoder: CaptionEncoder, rank: int, world_size: int
) -> tuple[dict, list[str]]:
    """Loss and accuracy of each offset over all of data.validation.

    Every rank calls it. The noise is the same at every call, and the result is the same
    for any number of ranks, up to rounding. Returns the keys validation_... of a row of
    the step log, and a sentence for each prompt that was cut on any rank. Raises
    ValueError, on every rank, naming a damaged sample.
    """
    cut: list[str] = []
    totals, device = None, engine.device
    engine.eval()
    batches = loader.validation_batches(recipe, caption_encoder, rank=rank, world_size=world_size)
    # All ranks have the same number of batches; surplus batches count 0 samples.
    while (item := on_all_ranks(lambda: next(batches, None), device)) is not None:
        number, num_samples, batch = item
        cut += batch.cut if num_samples else ()
        generator = torch.Generator(device).manual_seed(seed_for(0, number))
        with torch.no_grad():
            output = engine(
                batch.codes.to(device), batch.condition.to(device), batch.uncond.to(device), generator
            )
        means = [
            output.loss[None],
            output.loss_per_offset,
            output.accuracy_per_offset,
            output.loss.new_ones(1),
        ]
        sums = torch.cat(means).double() * num_samples
        totals = sums if totals is None else totals + sums
    engine.train()
    assert totals is not None, "the manifest counts at least one sample"
    *sums, count = mean_over_ranks(totals).tolist()
    loss, *per_offset = (value / count for value in sums)
    window = len(per_offset) // 2
    measured = {
        "validation_loss": loss,
        "validation_loss_per_offset": per_offset[:window],
        "validation_accuracy_per_offset": per_offset[window:],
    }
    if cut := gather_lists(cut):
        measured["validation_num_cut"] = len(cut)
    return measured, cut
