"""Sample grids during training: one image per prompt of train.sample_prompts."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from mmtensorar.captions.limits import excesses
from mmtensorar.image_tokenizers import to_images
from mmtensorar.model.conditions import CaptionEncoder
from mmtensorar.recipe import Recipe
from mmtensorar.sampling.decode import decode
from mmtensorar.sampling.trace import revised_per_offset
from mmtensorar.training.distributed import print_on_first
from mmtensorar.training.engine import gathered_model


def check(recipe: Recipe, num_factors: int, caption_encoder: CaptionEncoder) -> None:
    """Check the settings and prompts of sampling; print a note for each prompt that
    will be cut.

    Called before training. Otherwise the error would appear only at the first sample
    grid, or when somebody loads the finished model.

    Raises ValueError when a list in the recipe's sampler does not have one number per
    factor, and for a prompt that is too long when data.long_prompts is refuse.
    """
    recipe.sampler.per_factor(num_factors)
    if not recipe.train.sample_every:
        return
    for number, excess in excesses(caption_encoder, recipe.train.sample_prompts):
        prompt = f"train.sample_prompts: prompt {number + 1} has {excess}"
        if recipe.data.long_prompts == "refuse":
            raise ValueError(f"{prompt}, and data.long_prompts is refuse; shorten it")
        print_on_first(f"note: {prompt}, so it is cut")


def sample(
    engine: Any, recipe: Recipe, caption_encoder: CaptionEncoder, image_tokenizer: Any
) -> tuple[Image.Image, list[float]]:
    """Sample one image per prompt; return them as one grid, and the revised shares.

    The shares are those of `trace.revised_per_offset`. The noise is the same at every
    call. Every rank must call it, since ZeRO-3 gathers the weights from all ranks; all
    sample the same images.
    """
    condition = caption_encoder(list(recipe.train.sample_prompts)).to(engine.device)
    generator = torch.Generator(engine.device).manual_seed(recipe.run.seed)
    with gathered_model(engine) as model:
        decoded = decode(model, condition, recipe.sampler, generator=generator, keep_trace=True)
    assert decoded.trace is not None
    with torch.no_grad():
        pixels = image_tokenizer.decode(decoded.codes.cpu()).float().cpu()
    return image_grid(to_images(pixels)), revised_per_offset(decoded.trace)


def image_grid(images: list[Image.Image]) -> Image.Image:
    """Images of one size -> one grid of them, row by row, nearly square."""
    num, (width, height) = len(images), images[0].size
    columns = int(num**0.5)
    columns += columns * columns < num
    rows = -(-num // columns)
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    for number, image in enumerate(images):
        grid.paste(image, (number % columns * width, number // columns * height))
    return grid
