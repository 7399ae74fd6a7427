"""Checks before training: do the shards fit the image tokenizer, the backbone and the
ranks?
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from mmtensorar import ranks
from mmtensorar.data.loader import worker_rows
from mmtensorar.data.shard_mixture import (
    apportion_rows,
    codes_of,
    read_manifest,
    read_manifests,
    shard_cache,
    text_features_of,
)
from mmtensorar.data.shards import Manifest
from mmtensorar.data.url_cache import is_url, shown
from mmtensorar.model.conditions import CaptionEncoder
from mmtensorar.recipe import Data, Recipe
from mmtensorar.words import counted


def preflight(recipe: Recipe, image_tokenizer, caption_encoder: CaptionEncoder, *, world_size: int) -> str:
    """Check the recipe's shard sets, and return their fingerprint.

    Args:
        recipe: Its sections data, train and backbone are read.
        image_tokenizer: An ImageTokenizer, loaded.
        caption_encoder: The backbone's.
        world_size: Number of ranks.

    Raises ValueError, naming both sides, when the sets do not fit.
    """
    data = recipe.data
    manifests = read_manifests(data)
    _note_few_shards(data, manifests, grad_accum=recipe.train.grad_accum, world_size=world_size)
    rows = apportion_rows(data.weights, data.batch_size)
    _check_cache(data, manifests, rows, world_size)
    validation = {}
    if (folder := data.validation) is not None:
        validation[folder] = read_manifest(folder, shard_cache(data))
    for folder, manifest in (manifests | validation).items():
        _check_codes(folder, manifest, image_tokenizer)
        _check_classes(folder, manifest, caption_encoder, recipe.backbone.name)
        if data.text_features == "cached":
            _check_features(folder, manifest, caption_encoder, recipe.backbone.name)
    if len({manifest.classes for manifest in (manifests | validation).values()}) > 1:
        raise ValueError(
            f"classes: {', '.join(manifests | validation)} have different ones; "
            "expected the same in all of them"
        )
    if len(manifests) == 1:
        return next(iter(manifests.values())).fingerprint
    fingerprints = [[rows[folder], manifest.fingerprint] for folder, manifest in manifests.items()]
    return hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest()


def _check_codes(folder: str, manifest: Manifest, image_tokenizer) -> None:
    """Raise ValueError unless the recipe's image tokenizer made the codes."""
    codes = codes_of(manifest, folder)
    if codes.factor_sizes != tuple(image_tokenizer.factor_sizes):
        raise ValueError(
            f"codebook size: {folder} has codes of {_sizes(codes.factor_sizes)}, the recipe's image "
            f"tokenizer {image_tokenizer.name} has {_sizes(image_tokenizer.factor_sizes)}"
        )
    if codes.grid != tuple(image_tokenizer.grid):
        raise ValueError(
            f"grid: {folder} has images of {codes.grid[0]}x{codes.grid[1]} codes, the recipe's image "
            f"tokenizer {image_tokenizer.name} has {image_tokenizer.grid[0]}x{image_tokenizer.grid[1]}"
        )
    if codes.weight_hash != image_tokenizer.weight_hash:
        raise ValueError(
            f"image tokenizer weights: {folder} was encoded with {codes.image_tokenizer} "
            f"{codes.weight_hash[:12]}, the recipe's is {image_tokenizer.name} "
            f"{image_tokenizer.weight_hash[:12]}; run mmtensorar shards encode-codes again"
        )


def _check_classes(folder: str, manifest: Manifest, caption_encoder: CaptionEncoder, backbone: str) -> None:
    """Raise ValueError when the captions are class numbers and do not fit the
    backbone.
    """
    if (classes := manifest.classes) is None:
        return
    if caption_encoder.kind != "class":
        raise ValueError(
            f"{folder} holds images of numbered classes, but the {backbone} backbone takes captions"
        )
    assert caption_encoder.num_classes is not None
    if len(classes) > caption_encoder.num_classes:
        raise ValueError(
            f"{folder} has {counted(len(classes), 'class')}, "
            f"the {backbone} backbone {caption_encoder.num_classes}"
        )


def _check_features(folder: str, manifest: Manifest, caption_encoder: CaptionEncoder, backbone: str) -> None:
    """Raise ValueError unless the cached text features are those that the backbone
    takes.
    """
    if caption_encoder.kind != "features":
        raise ValueError(
            f"data.text_features is cached, but the {backbone} backbone takes no text features; expected live"
        )
    cached, wanted = text_features_of(manifest, folder), caption_encoder.identity()
    assert wanted is not None
    pairs = {
        "width of the features": (cached.width, wanted.width),
        "most tokens of a caption": (cached.max_tokens, wanted.max_tokens),
        "caption cleaning": (cached.cleaning, wanted.cleaning),
    }
    # Training on cached features needs no text encoder. If the encoder is on this
    # machine, its weights are compared, else only its name.
    if wanted.weight_hash is None:
        pairs["text encoder"] = (cached.text_encoder, wanted.text_encoder)
    elif wanted.weight_hash != cached.weight_hash:
        pairs["text encoder"] = (
            f"{cached.text_encoder} {cached.weight_hash[:12]}",
            f"{wanted.text_encoder} {wanted.weight_hash[:12]}",
        )
    for what, (stored, expected) in pairs.items():
        if stored != expected:
            raise ValueError(
                f"{what}: {folder} has {stored} for its text features, the recipe's backbone {expected}; run "
                "mmtensorar shards encode-text again, or set data.text_features to live"
            )


def _sizes(factor_sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, factor_sizes))


def _check_cache(
    data: Data, manifests: Mapping[str, Manifest], rows: Mapping[str, int], world_size: int
) -> None:
    """Raise ValueError when data.cache_gb is too small.

    The cache must hold all shards that this machine's rows read at the same time.
    """
    cache, needed, reading = shard_cache(data), 0, []
    for folder, manifest in manifests.items():
        if is_url(folder):
            largest = max(manifest.shards, key=lambda shard: shard.num_samples)
            lanes = min(len(manifest.shards), -(-rows[folder] * ranks.local_world_size() // world_size))
            if (size := cache.size(folder, largest)) is not None:
                needed += lanes * size
                reading.append(f"{lanes} of {shown(folder)}, of up to about {size / 1e9:.2g} GB each")
    if needed > cache.max_bytes:
        raise ValueError(
            f"data.cache_gb is {data.cache_gb:g}, but this machine reads {' and '.join(reading)} at the "
            f"same time: set it to {needed * 1.2 / 1e9:.2g} or more, or make smaller shards; otherwise "
            "they would be downloaded again and again"
        )


def _note_few_shards(
    data: Data, manifests: Mapping[str, Manifest], *, grad_accum: int, world_size: int
) -> None:
    """Print a note when several workers read different parts of one shard."""
    num_workers = world_size * len(worker_rows(data.batch_size, grad_accum, 0, world_size, data.num_workers))
    num_shards = sum(len(manifest.shards) for manifest in manifests.values())
    if num_shards < num_workers and ranks.is_first():
        fewer = "lower data.num_workers, or " if data.num_workers > 1 else ""
        print(
            f"note: {', '.join(manifests)} has {counted(num_shards, 'shard')} for "
            f"{counted(num_workers, 'reader')}; where reading is slow, {fewer}make the shards with a "
            "smaller --samples-per-shard",
            flush=True,
        )
