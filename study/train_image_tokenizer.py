"""Train a small JanusVQVAE on the pictures of a shard folder:
`python -m study.train_image_tokenizer RECIPE`.

It makes the tiny image tokenizer that ships with the project, and those of the study's
worlds; released image tokenizers are used unchanged. The first `warmup_steps` run
without quantization. Then the codebook starts from encoder outputs. Codes that stay
unused are moved onto encoder outputs until `revive_until` (a share of the steps).
Shapes: B pictures, N = B times the codes of one picture, C width of a code, V codes.
"""

import math
import sys
import time
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as functional
from pydantic import Field, model_validator
from torch import Tensor

from mmtensorar.checkpoints.released import fill
from mmtensorar.cli import Parser, command
from mmtensorar.data.pictures import sample_picture
from mmtensorar.data.shards import Manifest, iterate_shard
from mmtensorar.image_tokenizers import to_pixels
from mmtensorar.recipe import Section, read_recipe


class ImageTokenizerRecipe(Section):
    """Settings of one training run.

    shards: a folder made by data_tools; out: folder to write.
    """

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
        32, ge=32, multiple_of=32, description="multiple of 32, the number of normalization groups"
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
        None, ge=8, description="pixels a side of the crops that all steps but the last full_steps use"
    )
    full_steps: int = Field(0, ge=0)
    crop_batch_size: int = Field(64, ge=1)
    precision: Literal["bf16", "fp32"] = "bf16"
    log_every: int = Field(50, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.warmup_steps >= self.steps:
            problems.append(
                f"warmup_steps is {self.warmup_steps}, steps is {self.steps}; "
                "the codebook would never be trained"
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
    """All pictures of a shard folder, [N, H, W, 3] uint8.

    Raises ValueError for damage or another size.
    """
    manifest = Manifest.read(folder)
    if manifest.image_size != size:
        raise ValueError(
            f"{folder} has pictures of {manifest.image_size} pixels a side, image_size is {size}"
        )
    pictures = []
    for shard in manifest.shards:
        for sample in iterate_shard(folder, shard):
            where = f"{folder / shard.name}: sample {sample.key}"
            pictures.append(np.asarray(sample_picture(sample, where, size)))
    return np.stack(pictures)


def quantize(features: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest unit row of the codebook [V, C] for unit features [N, C]: rows [N, C]
    and codes [N].
    """
    rows = functional.normalize(codebook, dim=-1)
    codes = (features.detach() @ rows.detach().T).argmax(-1)
    return rows[codes], codes


def pixel_weights(pixels: Tensor, foreground: float) -> Tensor:
    """Weights [B, 1, H, W] of pixels [B, 3, H, W]: 1 for the median colour, up to
    `foreground` for others.

    Shapes cover a tenth of a picture; without weights, most of the capacity goes into
    smooth backgrounds.
    """
    median = pixels.flatten(2).median(-1).values[..., None, None]
    unlike = (pixels - median).abs().amax(1, keepdim=True).div(0.4).clamp(max=1)
    return 1 + (foreground - 1) * unlike


def plain_patches(pixels: Tensor, size: int) -> Tensor:
    """A number for the colour of each patch of one colour, -1 for other patches.

    pixels: [B, 3, H, W] in [-1, 1]. Returns [B, H / size, W / size] int64.
    """
    highest, lowest = functional.max_pool2d(pixels, size), -functional.max_pool2d(-pixels, size)
    plain = (highest - lowest).amax(1) < 0.12
    # Steps of 12 grey levels, wider than compression noise.
    level = ((highest + lowest) * 5.5).round().long() + 16
    red, green, blue = level.unbind(1)
    return torch.where(plain, (red * 64 + green) * 64 + blue, -1)


def centre_plain(features: Tensor, colors: Tensor) -> Tensor:
    """Unit features [N, C], those of plain patches replaced by the mean of their
    colour.

    colors: [N], see `plain_patches`. Every feature of the encoder sees the whole
    picture. Without this, the codes of an empty background also describe the rest of
    the picture: one background had 15 codes, which a language model cannot predict.
    """
    plain = colors >= 0
    _, group = colors[plain].unique(return_inverse=True)
    sums = features.new_zeros(len(group.unique()), features.shape[1]).index_add_(0, group, features[plain])
    centred = features.clone()
    centred[plain] = functional.normalize(sums, dim=-1)[group]
    return centred


def crop_on_foreground(pixels: Tensor, unlike: Tensor, size: int, stride: int) -> Tensor:
    """One random crop [B, C, size, size] of each picture, more often where `unlike` is
    high.

    Args:
        pixels: [B, C, H, W].
        unlike: [B, 1, H, W]. Every position keeps a chance.
        size: pixels a side.
        stride: the pixels of one code. Offsets are its multiples, so that a crop has
            the same grid of codes as the picture.
    """
    density = functional.avg_pool2d(unlike, size, stride)[:, 0]
    chosen = torch.multinomial(density.flatten(1) + 0.02, 1)[:, 0]
    rows = (chosen // density.shape[2] * stride).tolist()
    columns = (chosen % density.shape[2] * stride).tolist()
    return torch.stack(
        [p[:, r : r + size, c : c + size] for p, r, c in zip(pixels, rows, columns, strict=True)]
    )


def build(recipe: ImageTokenizerRecipe) -> torch.nn.Module:
    """A fresh JanusVQVAE, or that of `recipe.start`, in training mode."""
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

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
    else:
        for module in model.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                # With transformers' initial deviation of 0.02, all features of such a
                # narrow model point in one direction, and stay there.
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                torch.nn.init.zeros_(module.bias)
    # Convolutions this narrow run several times faster in this memory layout on CPUs.
    return model.to(memory_format=torch.channels_last).train()


class Codebook:
    """The codes of a model in training: how they start, and which are moved because
    they are unused.
    """

    def __init__(self, recipe: ImageTokenizerRecipe, weight: torch.nn.Parameter):
        self.recipe, self.weight = recipe, weight
        self.is_fresh = recipe.start is None
        self.usage = torch.full((len(weight),), 0.0 if self.is_fresh else 1.0)

    @property
    def num_used(self) -> int:
        return int((self.usage > 0.02).sum())

    @torch.no_grad()
    def before(self, step: int, flat: Tensor, colors: Tensor) -> None:
        """Start the codes from features, or move unused ones onto features, where it is
        due at a step.

        Args:
            step: of the training, from warmup_steps on.
            flat: unit features [N, C].
            colors: of their patches, [N], see `plain_patches`.
        """
        recipe = self.recipe
        if step == recipe.warmup_steps and self.is_fresh:
            self.weight.copy_(flat[torch.randint(len(flat), (len(self.weight),))])
            self.usage.fill_(1.0)
        elif step % 20 == 0 and step < recipe.revive_until * recipe.steps:
            dead = self.usage < 0.02
            # With plain_weight a plain patch has its code, and more of them would only
            # make copies.
            pool = flat[colors < 0] if recipe.plain_weight and (colors < 0).any() else flat
            self.weight[dead] = pool[torch.randint(len(pool), (int(dead.sum()),))]
            self.usage[dead] = 1.0

    def count(self, codes: Tensor) -> None:
        """Record the codes [N] of a step: usage is a moving average over steps."""
        used = torch.bincount(codes, minlength=len(self.usage)).clamp(max=1)
        self.usage.mul_(0.98).add_(used, alpha=0.02)


class Losses(NamedTuple):
    """Of one step: error is output minus pixels, [B, 3, H, W]; the others are
    scalars.
    """

    total: Tensor
    error: Tensor
    commitment: Tensor
    spread: Tensor


def losses(
    recipe: ImageTokenizerRecipe,
    model: torch.nn.Module,
    codebook: Codebook,
    step: int,
    pixels: Tensor,
    weight_of_pixel: Tensor,
) -> Losses:
    """Encode, quantize (after the warm-up) and decode a batch.

    Args:
        recipe: the settings.
        model: the JanusVQVAE.
        codebook: its codes.
        step: of the training.
        pixels: [B, 3, H, W] in [-1, 1].
        weight_of_pixel: [B, 1, H, W].
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
        features = model.quant_conv(model.encoder(pixels))
    features = functional.normalize(features.float().permute(0, 2, 3, 1), dim=-1)
    flat = features.reshape(-1, recipe.embed_dim)
    colors = plain_patches(pixels, recipe.image_size // model.config.num_patches).flatten()
    centred = centre_plain(flat.detach(), colors) if recipe.plain_weight else flat.detach()
    spread = (flat - centred).square().sum(-1).mean()
    commitment = torch.zeros(())
    latent = features
    if step >= recipe.warmup_steps:
        codebook.before(step, flat, colors)
        rows, codes = quantize(centred, codebook.weight)
        codebook.count(codes)
        commitment = (rows - flat.detach()).square().sum(-1).mean()
        commitment = commitment + recipe.commitment * (flat - rows.detach()).square().sum(-1).mean()
        latent = (flat + (rows - flat).detach()).view_as(features)  # straight-through gradient
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
        output = model.decoder(model.post_quant_conv(latent.permute(0, 3, 1, 2)))
    error = output.float() - pixels
    total = (
        (weight_of_pixel * (error.abs() + error.square())).mean() + commitment + recipe.plain_weight * spread
    )
    return Losses(total, error, commitment, spread)


def train(recipe: ImageTokenizerRecipe) -> None:
    """Run the recipe and write config.json and model.safetensors to `recipe.out`.

    Raises ValueError when the loss is not finite.
    """
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    pictures = load_pictures(Path(recipe.shards), recipe.image_size)
    model = build(recipe)
    codebook = Codebook(recipe, model.quantize.embedding.weight)
    pixels_per_code = recipe.image_size // model.config.num_patches
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
    started, num_seen = time.time(), 0
    for step in range(recipe.steps):
        cropped = recipe.crop is not None and step < recipe.steps - recipe.full_steps
        batch_size = recipe.crop_batch_size if cropped else recipe.batch_size
        pixels = to_pixels(pictures[rng.integers(len(pictures), size=batch_size)])
        weight_of_pixel = pixel_weights(pixels, recipe.foreground_weight)
        if cropped:
            both = torch.cat([pixels, weight_of_pixel], dim=1)
            both = crop_on_foreground(both, weight_of_pixel - 1, recipe.crop, pixels_per_code)
            pixels, weight_of_pixel = both[:, :3].contiguous(memory_format=torch.channels_last), both[:, 3:]
        num_seen += batch_size
        of_step = losses(recipe, model, codebook, step, pixels, weight_of_pixel)
        if not math.isfinite(of_step.total.item()):
            raise ValueError(f"step {step}: the loss is {of_step.total.item()}; lower lr")
        optimizer.zero_grad(set_to_none=True)
        of_step.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % recipe.log_every == 0 or step == recipe.steps - 1:
            rate = num_seen / (time.time() - started)
            _log(recipe, step, of_step, codebook, rate)
    with torch.no_grad():
        weight = codebook.weight
        weight.copy_(
            functional.normalize(weight, dim=-1)
        )  # so that transformers' own encode gives the same codes
    model.half().save_pretrained(recipe.out)  # small on disk; it is used in float32


def _log(recipe: ImageTokenizerRecipe, step: int, of_step: Losses, codebook: Codebook, rate: float) -> None:
    error = of_step.error
    print(
        f"step {step}/{recipe.steps} l1 {error.abs().mean():.4f} mse {error.square().mean():.5f} "
        f"commitment {of_step.commitment.item():.4f} plain spread {of_step.spread.item():.4f} "
        f"codes used {codebook.num_used} {rate:.0f} images or crops/s",
        flush=True,
    )


@command
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m study.train_image_tokenizer",
        description="Train a small JanusVQVAE on the pictures of a shard folder.",
        example="recipes/tiny/image_tokenizer.yaml steps=200",
    )
    parser.add_argument("recipe", type=Path, help="YAML file; see recipes/tiny/image_tokenizer.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    options = parser.parse_args(arguments)
    try:
        train(read_recipe(ImageTokenizerRecipe, options.recipe, options.overrides))
    except KeyboardInterrupt:
        print("stopped; nothing was written, the same command starts from the beginning", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
