"""Train a small JanusVQVAE on the pictures of a shard folder: `python -m study.train_image_tokenizer RECIPE`.

It exists to make the tiny image tokenizer that ships with the project; released tokenizers are used as they are.
Stages: the first `warmup_steps` run without quantisation, then the codebook starts from encoder outputs, and codes
that stay unused are moved onto encoder outputs until `revive_until` (share of the steps).
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from mmtensorar.checkpoints.released import fill
from mmtensorar.data.pictures import sample_picture
from mmtensorar.data.shards import Manifest, iterate_shard
from mmtensorar.image_tokenizers import to_pixels
from mmtensorar.recipe import Section, read_recipe


class ImageTokenizerRecipe(Section):
    """Settings of one training run. shards: a folder made by data_tools; out: folder to write."""

    shards: str
    out: str
    seed: int = 0
    start: str | None = Field(
        None, description="folder of an image tokenizer to train on, instead of a fresh one"
    )
    image_size: int = Field(ge=16)
    num_embeddings: int = Field(ge=2)
    embed_dim: int = Field(8, ge=1)
    latent_channels: int = Field(64, ge=1)
    base_channels: int = Field(
        32, ge=32, multiple_of=32, description="multiple of the 32 groups that are normalised"
    )
    channel_multiplier: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = [1, 1, 2, 2]
    num_res_blocks: int = Field(1, ge=1)
    steps: int = Field(ge=1)
    warmup_steps: int = Field(200, ge=0)
    revive_until: float = Field(0.6, ge=0, le=1)
    batch_size: int = Field(32, ge=1)
    lr: float = Field(1e-3, gt=0)
    commitment: float = Field(0.25, ge=0)
    foreground_weight: float = Field(1.0, ge=1)
    plain_weight: float = Field(0.0, ge=0, description="weight of pulling patches of one colour to one code")
    crop: int | None = Field(
        None, ge=8, description="pixels a side of the crops of all but the last full_steps"
    )
    full_steps: int = Field(0, ge=0)
    crop_batch_size: int = Field(64, ge=1)
    precision: Literal["bf16", "fp32"] = "bf16"
    log_every: int = Field(50, ge=1)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = []
        if self.warmup_steps >= self.steps:
            problems.append(
                f"warmup_steps is {self.warmup_steps}, steps is {self.steps}; the codebook would never be trained"
            )
        if self.crop is not None and self.crop > self.image_size:
            problems.append(f"crop is {self.crop}, image_size is {self.image_size}")
        for key in ("image_size", "crop"):
            size, factor = getattr(self, key), 2 ** (len(self.channel_multiplier) - 1)
            if size is not None and size % factor:
                problems.append(
                    f"{key} is {size}; expected a multiple of {factor}, the pixels of one code a side"
                )
        if problems:
            raise ValueError(*problems)
        return self


def load_pictures(folder: Path, size: int) -> np.ndarray:
    """Every picture of a shard folder as [N, H, W, 3] uint8. Raises ValueError for damage or another size."""
    manifest = Manifest.read(folder)
    if manifest.image_size != size:
        raise ValueError(
            f"{folder} has pictures of {manifest.image_size} pixels a side, image_size is {size}"
        )
    pictures = []
    for shard in manifest.shards:
        for sample in iterate_shard(folder, shard):
            pictures.append(np.asarray(sample_picture(sample, f"{folder / shard.name}: sample {sample.key}", size)))
    return np.stack(pictures)


def quantize(features: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest unit row for each unit feature. features [N, C], codebook [V, C] -> (rows [N, C], codes [N])."""
    rows = F.normalize(codebook, dim=-1)
    codes = (features.detach() @ rows.detach().T).argmax(-1)
    return rows[codes], codes


def pixel_weights(pixels: Tensor, foreground: float) -> Tensor:
    """[B, 3, H, W] -> [B, 1, H, W]: 1 for the picture's median colour, rising to `foreground` for pixels unlike it.

    Shapes cover a tenth of a picture; unweighted, most of the capacity goes into smooth grounds.
    """
    median = pixels.flatten(2).median(-1).values[..., None, None]
    unlike = (pixels - median).abs().amax(1, keepdim=True).div(0.4).clamp(max=1)
    return 1 + (foreground - 1) * unlike


def plain_patches(pixels: Tensor, size: int) -> Tensor:
    """[B, 3, H, W] in [-1, 1] -> [B, H / size, W / size] int64: a number for the colour of each patch of one colour, else -1."""
    highest, lowest = F.max_pool2d(pixels, size), -F.max_pool2d(-pixels, size)
    plain = (highest - lowest).amax(1) < 0.12
    level = (
        (highest + lowest) * 5.5
    ).round().long() + 16  # steps of 12 grey levels, wider than compression noise
    red, green, blue = level.unbind(1)
    return torch.where(plain, (red * 64 + green) * 64 + blue, -1)


def centre_plain(features: Tensor, colors: Tensor) -> Tensor:
    """Unit features [N, C], those of plain patches replaced by the mean of their colour; colors [N], -1 is none.

    Without it an encoder whose every feature sees the whole picture tells of it in the codes of empty ground too: 15
    codes for one ground, of which a language model can make nothing.
    """
    plain = colors >= 0
    _, group = colors[plain].unique(return_inverse=True)
    sums = features.new_zeros(len(group.unique()), features.shape[1]).index_add_(0, group, features[plain])
    centred = features.clone()
    centred[plain] = F.normalize(sums, dim=-1)[group]
    return centred


def crop_on_foreground(pixels: Tensor, unlike: Tensor, size: int, stride: int) -> Tensor:
    """Cut one size x size crop from each picture, oftener where `unlike` [B, 1, H, W] is high.

    Offsets are multiples of stride, the pixels of one code, so that a crop meets the codes' grid as
    the picture does. Every place keeps a chance. pixels [B, C, H, W] -> [B, C, size, size].
    """
    places = F.avg_pool2d(unlike, size, stride)[:, 0]
    chosen = torch.multinomial(places.flatten(1) + 0.02, 1)[:, 0]
    rows, columns = (
        (chosen // places.shape[2] * stride).tolist(),
        (chosen % places.shape[2] * stride).tolist(),
    )
    return torch.stack(
        [p[:, r : r + size, c : c + size] for p, r, c in zip(pixels, rows, columns, strict=True)]
    )


def train(recipe: ImageTokenizerRecipe) -> None:
    """Run the recipe and write config.json and model.safetensors to `recipe.out`."""
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    pictures = load_pictures(Path(recipe.shards), recipe.image_size)
    config = JanusVQVAEConfig(
        embed_dim=recipe.embed_dim,
        num_embeddings=recipe.num_embeddings,
        latent_channels=recipe.latent_channels,
        base_channels=recipe.base_channels,
        channel_multiplier=recipe.channel_multiplier,
        num_res_blocks=recipe.num_res_blocks,
        num_patches=recipe.image_size // 2 ** (len(recipe.channel_multiplier) - 1),
    )
    model = JanusVQVAE(config)
    if recipe.start is not None:
        fill(model.state_dict(), Path(recipe.start), lambda name: name)
    for module in [] if recipe.start is not None else model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            # transformers' 0.02 normal start makes all features point one way at this width, and they stay so.
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            torch.nn.init.zeros_(module.bias)
    # Convolutions this narrow run several times faster in this memory layout on CPUs.
    model = model.to(memory_format=torch.channels_last).train()
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 1e-4}, {"params": rest, "weight_decay": 0.0}],
        lr=recipe.lr,
        betas=(0.9, 0.99),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.lr, total_steps=recipe.steps, pct_start=0.05, final_div_factor=100
    )
    usage = torch.full((recipe.num_embeddings,), float(recipe.start is not None))
    started, seen = time.time(), 0
    for step in range(recipe.steps):
        cropped = recipe.crop is not None and step < recipe.steps - recipe.full_steps
        batch_size = recipe.crop_batch_size if cropped else recipe.batch_size
        chosen = pictures[rng.integers(len(pictures), size=batch_size)]
        pixels = to_pixels(chosen)
        weight_of_pixel = pixel_weights(pixels, recipe.foreground_weight)
        if cropped:
            both = torch.cat([pixels, weight_of_pixel], dim=1)
            both = crop_on_foreground(
                both, weight_of_pixel - 1, recipe.crop, recipe.image_size // config.num_patches
            )
            pixels, weight_of_pixel = both[:, :3].contiguous(memory_format=torch.channels_last), both[:, 3:]
        seen += batch_size
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
            features = model.quant_conv(model.encoder(pixels))
        features = F.normalize(features.float().permute(0, 2, 3, 1), dim=-1)
        flat = features.reshape(-1, recipe.embed_dim)
        colors = plain_patches(pixels, recipe.image_size // config.num_patches).flatten()
        centred = centre_plain(flat.detach(), colors) if recipe.plain_weight else flat.detach()
        spread = (flat - centred).square().sum(-1).mean()
        commitment = torch.zeros(())
        latent = features
        if step >= recipe.warmup_steps:
            weight = model.quantize.embedding.weight
            with torch.no_grad():
                if step == recipe.warmup_steps and recipe.start is None:
                    weight.copy_(flat[torch.randint(len(flat), (len(weight),))])
                    usage.fill_(1.0)
                elif step % 20 == 0 and step < recipe.revive_until * recipe.steps:
                    dead = usage < 0.02
                    # With plain_weight a plain patch has its code, and more of them would only make copies.
                    pool = flat[colors < 0] if recipe.plain_weight and (colors < 0).any() else flat
                    weight[dead] = pool[torch.randint(len(pool), (int(dead.sum()),))]
                    usage[dead] = 1.0
            rows, codes = quantize(centred, weight)
            usage.mul_(0.98).add_(torch.bincount(codes, minlength=len(usage)).clamp(max=1), alpha=0.02)
            commitment = (rows - flat.detach()).square().sum(-1).mean()
            commitment = commitment + recipe.commitment * (flat - rows.detach()).square().sum(-1).mean()
            latent = (flat + (rows - flat).detach()).view_as(features)  # straight-through gradient
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
            output = model.decoder(model.post_quant_conv(latent.permute(0, 3, 1, 2)))
        error = output.float() - pixels
        loss = (
            (weight_of_pixel * (error.abs() + error.square())).mean()
            + commitment
            + recipe.plain_weight * spread
        )
        if not torch.isfinite(loss):
            raise ValueError(f"step {step}: the loss is {loss.item()}; lower lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % recipe.log_every == 0 or step == recipe.steps - 1:
            print(
                f"step {step}/{recipe.steps} l1 {error.abs().mean():.4f} mse {error.square().mean():.5f} "
                f"commitment {commitment.item():.4f} plain spread {spread.item():.4f} codes used {int((usage > 0.02).sum())} "
                f"{seen / (time.time() - started):.0f} images or crops/s",
                flush=True,
            )
    with torch.no_grad():
        weight = model.quantize.embedding.weight
        weight.copy_(F.normalize(weight, dim=-1))  # so that transformers' own encode finds the same codes
    model.half().save_pretrained(recipe.out)  # its users compute in float32; stored small


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(arguments)
    try:
        train(read_recipe(ImageTokenizerRecipe, args.recipe, args.overrides))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written, the same command starts afresh", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
