"""Sample grids during training: one image per prompt of train.sample_prompts."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from mmtensorar.image_tokenizers import to_images
from mmtensorar.model.conditions import CaptionEncoder
from mmtensorar.recipe import Recipe, SamplerSettings
from mmtensorar.sampling.decode import decode
from mmtensorar.sampling.trace import revised_per_offset
from mmtensorar.training.engine import gathered_model


def check(sampler: SamplerSettings, num_factors: int) -> None:
    """Raise ValueError when a list in sampler does not have one number per factor.

    Called before training. Otherwise the error would appear only at the first sample
    grid, or when somebody loads the finished model.
    """
    sampler.per_factor(num_factors)


def sample(
    engine: Any, recipe: Recipe, caption_encoder: CaptionEncoder, image_tokenizer: Any
) -> tuple[Image.Image, list[float]]:
    """Sample one image per prompt; return them as one grid, and the revised shares.

    The shares are those of `trace.revised_per_offset`. The noise is the same at every
    call. Every rank must call it and samples the same images: under ZeRO-3 each layer's
    weights are gathered from all ranks, so rank 0 alone would wait forever.
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
