"""Shards -> training batches, as a list of small stages.

    positions -> codes and caption of each row (mixture.py, order.py) -> batch -> condition

Which samples a global batch holds, and in which order, depends on the seed and the number of the batch alone, for any
number of ranks and readers: see order.py. A reader is one worker process of one rank; the rows of the rank's share of a
batch are dealt out to its readers, each reads the lanes of its rows, and here they are put together again. What is drawn
for a sample (crop, prompt or none) depends on its position too.

Letters: B rows of a global batch, b rows of a micro batch, T image tokens, F factors, A crops.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmtensorar import backbones
from mmtensorar.captions.encoders import (
    ClassNumbers,
    T5Features,
    encoder_hash,
    left_pad,
)
from mmtensorar.data.shard_mixture import (
    Lanes,
    Row,
    apportion,
    read_manifest,
    sources,
)
from mmtensorar.data.shards import (
    Codes,
    Manifest,
    TextFeatures,
    check_codes,
    check_features,
    decode_caption,
    decode_codes,
    decode_features,
)
from mmtensorar.data.url_cache import Cache, is_url, shown
from mmtensorar.model.conditions import CaptionEncoder, Condition
from mmtensorar.processes import release_in_child
from mmtensorar.recipe import Recipe

DRAWS = 2  # separates the random numbers of a position from those of order.py


# ---- before training -------------------------------------------------------------------------


def preflight(recipe: Recipe, image_tokenizer, *, world_size: int) -> str:
    """The fingerprint of the shards.

    Raises ValueError, naming both sides, when they do not fit the recipe's image tokenizer, backbone or ranks.
    """
    manifests = read_manifests(recipe)
    _note_num_shards(recipe, manifests, world_size)
    rows = apportion(recipe.data.weights, recipe.data.batch_size)
    _check_cache(recipe, manifests, rows, world_size)
    validation = {}
    if (folder := recipe.data.validation) is not None:
        validation[folder] = read_manifest(folder, cache_of(recipe))
    for folder, manifest in (manifests | validation).items():
        _check_set(recipe, folder, manifest, image_tokenizer)
    if len({manifest.classes for manifest in (manifests | validation).values()}) > 1:
        raise ValueError(
            f"classes: {', '.join(manifests | validation)} have different ones; expected the same in all of them"
        )
    if len(manifests) == 1:
        return next(iter(manifests.values())).fingerprint
    together = [[rows[folder], manifest.fingerprint] for folder, manifest in manifests.items()]
    return hashlib.sha256(json.dumps(together).encode()).hexdigest()


def cache_of(recipe: Recipe) -> Cache:
    """Where the shards of sets at a URL are kept."""
    return Cache(recipe.data.cache, int(recipe.data.cache_gb * 1e9))


def read_manifests(recipe: Recipe) -> dict[str, Manifest]:
    """Of each shard set of the recipe, by its folder. Raises ValueError when one has no codes."""
    manifests = {folder: read_manifest(folder, cache_of(recipe)) for folder in recipe.data.weights}
    for folder, manifest in manifests.items():
        _codes(manifest, folder)
    return manifests


def epoch_samples(recipe: Recipe) -> int:
    """Samples of all shard sets together."""
    return sum(manifest.num_samples for manifest in read_manifests(recipe).values())


def steps_of(recipe: Recipe) -> int:
    """Optimiser steps that the recipe's train.epochs are."""
    return max(1, int(recipe.train.epochs * epoch_samples(recipe) / recipe.data.batch_size))


def _check_set(recipe: Recipe, folder: str, manifest: Manifest, image_tokenizer) -> None:
    codes = _codes(manifest, folder)
    if codes.factor_sizes != tuple(image_tokenizer.factor_sizes):
        raise ValueError(
            f"codebook size: {folder} has codes of {_sizes(codes.factor_sizes)}, the recipe's image tokenizer "
            f"{image_tokenizer.name} has {_sizes(image_tokenizer.factor_sizes)}"
        )
    if codes.grid != tuple(image_tokenizer.grid):
        raise ValueError(
            f"grid: {folder} has images of {codes.grid[0]}x{codes.grid[1]} codes, the recipe's image tokenizer "
            f"{image_tokenizer.name} has {image_tokenizer.grid[0]}x{image_tokenizer.grid[1]}"
        )
    if codes.weight_hash != image_tokenizer.weight_hash:
        raise ValueError(
            f"image tokenizer weights: {folder} was encoded with {codes.image_tokenizer} {codes.weight_hash[:12]}, the "
            f"recipe's is {image_tokenizer.name} {image_tokenizer.weight_hash[:12]}; run data_tools/encode_codes.py again"
        )
    if manifest.classes is not None or recipe.data.text_features == "cached":
        _check_condition(recipe, folder, manifest, backbones.caption_encoder(recipe.backbone))


def _codes(manifest: Manifest, folder: str) -> Codes:
    if manifest.codes is None:
        raise ValueError(f"{folder} has no image codes; run data_tools/encode_codes.py on it")
    return manifest.codes


def _check_condition(
    recipe: Recipe, folder: str, manifest: Manifest, caption_encoder: CaptionEncoder
) -> None:
    """Raise ValueError unless the shards' classes or cached features are those that the backbone takes."""
    backbone = recipe.backbone.name
    if (classes := manifest.classes) is not None:
        if not isinstance(caption_encoder, ClassNumbers):
            raise ValueError(
                f"{folder} holds images of numbered classes, but the {backbone} backbone takes captions"
            )
        if len(classes) > caption_encoder.num_classes:
            num_classes = caption_encoder.num_classes
            raise ValueError(f"{folder} has {len(classes)} classes, the {backbone} backbone {num_classes}")
    if recipe.data.text_features == "live":
        return
    if not isinstance(caption_encoder, T5Features):
        raise ValueError(
            f"data.text_features is cached, but the {backbone} backbone takes no text features; expected live"
        )
    text, encoder = _text_features(manifest, folder), caption_encoder
    pairs = {
        "features as wide as": (text.width, encoder.dim),
        "tokens a caption up to": (text.max_tokens, encoder.num_slots),
        "caption cleaning": (text.cleaning, encoder.cleaning),
    }
    # The weights decide where they are at hand; training on cached features needs no text encoder otherwise.
    if not Path(encoder.path).is_dir():
        pairs["text encoder"] = (text.text_encoder, encoder.path)
    elif (found := encoder_hash(encoder.path)) != text.weight_hash:
        pairs["text encoder"] = (
            f"{text.text_encoder} {text.weight_hash[:12]}",
            f"{encoder.path} {found[:12]}",
        )
    for what, (cached, wanted) in pairs.items():
        if cached != wanted:
            raise ValueError(
                f"{what}: {folder} has {cached} in its text features, the recipe's backbone {wanted}; run "
                "data_tools/encode_text.py again, or set data.text_features to live"
            )


def _text_features(manifest: Manifest, folder: str) -> TextFeatures:
    if manifest.text_features is None:
        raise ValueError(
            f"data.text_features is cached, but {folder} has no text features; run data_tools/encode_text.py on it"
        )
    return manifest.text_features


def _sizes(factor_sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, factor_sizes))


def _check_cache(
    recipe: Recipe, manifests: Mapping[str, Manifest], rows: Mapping[str, int], world_size: int
) -> None:
    """Raise ValueError when the cache cannot hold the shards that this machine's rows read at the same time."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    cache, needed, told = cache_of(recipe), 0, []
    for folder, manifest in manifests.items():
        if is_url(folder):
            largest = max(manifest.shards, key=lambda shard: shard.num_samples)
            lanes = min(len(manifest.shards), -(-rows[folder] * here // world_size))
            if (size := cache.size(folder, largest)) is not None:
                needed += lanes * size
                told.append(f"{lanes} of {shown(folder)}, of up to about {size / 1e9:.2g} GB each")
    if needed > cache.max_bytes:
        raise ValueError(
            f"data.cache_gb is {recipe.data.cache_gb:g}, but at the same time {' and '.join(told)} are read here: set it to "
            f"{needed * 1.2 / 1e9:.2g} or more, or make smaller shards; otherwise they would be downloaded again and again"
        )


def _note_num_shards(recipe: Recipe, manifests: Mapping[str, Manifest], world_size: int) -> None:
    """Every reader has its samples all the same, but several read from one shard, each from another place in it."""
    readers = world_size * len(
        shares(recipe.data.batch_size, recipe.train.grad_accum, 0, world_size, recipe.data.num_workers)
    )
    found = sum(len(manifest.shards) for manifest in manifests.values())
    if found < readers and os.environ.get("RANK", "0") == "0":
        fewer = "lower data.num_workers, or " if recipe.data.num_workers > 1 else ""
        print(
            f"note: {', '.join(manifests)} has {found} shards for {readers} readers; where reading is slow, {fewer}"
            "make the shards with a smaller --samples-per-shard",
            flush=True,
        )


# ---- stages ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """One of a rank's readers, and all that its stream depends on.

    sets: folder, manifest and rows of each. groups: per micro batch the rows of the global batch that this reader has, first
    and stop. cached: whether it reads text features. skip_errors: whether the next whole sample stands in for a damaged one.
    middle_crop: of several crops the one of the middle, not one by chance.
    """

    sets: tuple[tuple[str, Manifest, int], ...]
    cache: Cache
    seed: int
    shuffle: int
    uncond_rate: float
    batch_size: int  # B
    groups: tuple[tuple[int, int], ...]
    cached: bool
    skip_errors: bool
    middle_crop: bool = False

    def lanes(self) -> Lanes:
        extensions = ("txt", "codes.npy", *(["t5.npy"] if self.cached else []))  # pictures are not read
        found = sources(self.sets, seed=self.seed, shuffle=self.shuffle, cache=self.cache)
        return Lanes(found, extensions, 2 * sum(stop - first for first, stop in self.groups) + 2)


class Decoded(NamedTuple):
    """One row of a batch. name: shard and key. codes: [T, F] uint16. features: [tokens, C] float16 when they are cached.

    skipped: what was wrong with the sample whose place it takes.
    """

    name: str
    codes: np.ndarray
    caption: str
    uncond: bool
    features: np.ndarray | None
    skipped: str | None


class RawBatch(NamedTuple):
    """What a reader hands over. codes: [n, T, F] uint16. uncond: [n] bool. features: n of them, or of None."""

    codes: np.ndarray
    captions: list[str]
    uncond: np.ndarray
    features: list[np.ndarray | None]
    names: list[str]
    skipped: list[str]


class Batch(NamedTuple):
    """A micro batch. codes: [b, T, F] int64. condition: b rows. uncond: [b] bool.

    names: shard and key of each row. skipped: a sentence per damaged sample.
    """

    codes: Tensor
    condition: Condition
    uncond: Tensor
    names: tuple[str, ...]
    skipped: tuple[str, ...]


def positions(reader: Reader, skip: int) -> Iterator[int]:
    """Of the reader's rows, micro batch after micro batch, without the first `skip` micro batches."""
    for micro in count(skip):
        step, group = divmod(micro, len(reader.groups))
        for row in range(*reader.groups[group]):
            yield step * reader.batch_size + row


def decode(positions: Iterable[int], reader: Reader) -> Iterator[Decoded]:
    """Each position's sample, with a crop chosen and a coin tossed for training without the prompt.

    Raises ValueError naming shard and key of a damaged one, unless another stands in for it.
    """
    lanes = reader.lanes()
    for position in positions:
        rng = np.random.default_rng([DRAWS, reader.seed, position])
        crop, uncond = rng.random(), bool(rng.random() < reader.uncond_rate)
        skipped = None
        for row in lanes.rows(position):
            try:
                if isinstance(row, ValueError):
                    raise row
                yield _decoded(row, None if reader.middle_crop else crop, uncond, reader.cached)._replace(
                    skipped=skipped
                )
                break
            except ValueError as error:
                if not reader.skip_errors:
                    raise
                skipped = skipped or str(error)
        else:
            raise ValueError(f"{skipped}; and there is no whole sample in the set that could stand in for it")


def _decoded(row: Row, crop: float | None, uncond: bool, cached: bool) -> Decoded:
    members, manifest = row.sample.members, row.source.manifest
    for extension in ("txt", "codes.npy", *(["t5.npy"] if cached else [])):
        if extension not in members:
            raise ValueError(f"{row.where}: no {extension} member")
    crops = decode_codes(members["codes.npy"], row.where)  # [A, T, F]
    check_codes(crops, manifest.codes, row.where)
    features = None
    if cached:
        features = decode_features(members["t5.npy"], row.where)
        check_features(features, manifest.text_features, row.where)
    caption = decode_caption(members["txt"], row.where)
    # Where there are corners, the middle comes after the four; mirror images come last.
    number = int(crop * len(crops)) if crop is not None else 4 if len(crops) >= 5 else 0
    return Decoded(row.where, crops[number], caption, uncond, features, None)


def collate(rows: list[Decoded]) -> RawBatch:
    names, codes, captions, uncond, features, skipped = zip(*rows, strict=True)
    sentences = [sentence for sentence in skipped if sentence]
    return RawBatch(
        np.stack(codes), list(captions), np.array(uncond, dtype=bool), list(features), list(names), sentences
    )


def joined(parts: list[RawBatch]) -> RawBatch:
    """The parts that the readers of a rank made of one micro batch."""
    codes, captions, uncond, *others = zip(*parts, strict=True)
    lists = [sum(each, []) for each in (captions, *others)]
    return RawBatch(np.concatenate(codes), lists[0], np.concatenate(uncond), *lists[1:])


def conditioned(batch: RawBatch, caption_encoder: CaptionEncoder, num_slots: int | None) -> Batch:
    """num_slots: of cached text features, None when captions are encoded."""
    if num_slots is not None:
        condition = left_pad([torch.from_numpy(features) for features in batch.features], num_slots)
    else:
        condition = caption_encoder(batch.captions)
    codes = torch.from_numpy(batch.codes.astype(np.int64))
    return Batch(codes, condition, torch.from_numpy(batch.uncond), tuple(batch.names), tuple(batch.skipped))


# ---- the stream ------------------------------------------------------------------------------


class Failure(NamedTuple):
    """A sentence on its way out of a worker, where an exception would come out wrapped in a traceback."""

    sentence: str


@dataclass(frozen=True)
class Readers(IterableDataset):
    """All readers of one rank: worker w of a DataLoader iterates over reader w, without its first skip micro batches."""

    readers: tuple[Reader, ...]
    skip: int

    def __iter__(self) -> Iterator[RawBatch | Failure]:
        worker = get_worker_info()
        reader = self.readers[worker.id if worker else 0]
        first, stop = reader.groups[0]
        batches = wds.DataPipeline(
            partial(positions, reader, self.skip),
            partial(decode, reader=reader),
            wds.batched(stop - first, collation_fn=collate, partial=False),
        )
        try:
            yield from batches
        except (ValueError, OSError) as error:
            yield Failure(str(error))


def stream(
    recipe: Recipe,
    caption_encoder: CaptionEncoder,
    *,
    rank: int,
    world_size: int,
    skip_batches: int = 0,
) -> Iterator[Batch]:
    """Endless micro batches of one rank, of b = data.batch_size // (world_size * train.grad_accum) rows.

    skip_batches: micro batches of this rank that are passed over, without being read. Raises ValueError naming shard and key
    at the first damaged sample, unless data.on_error is skip.
    """
    settings = recipe.data
    manifests = read_manifests(recipe)
    rows = apportion(settings.weights, settings.batch_size)
    num_slots = _num_slots(recipe, manifests)
    readers = tuple(
        Reader(
            sets=tuple((folder, manifest, rows[folder]) for folder, manifest in manifests.items()),
            cache=cache_of(recipe),
            seed=recipe.run.seed,
            shuffle=settings.shuffle,
            uncond_rate=settings.uncond_rate,
            batch_size=settings.batch_size,
            groups=groups,
            cached=num_slots is not None,
            skip_errors=settings.on_error == "skip",
        )
        for groups in shares(
            settings.batch_size, recipe.train.grad_accum, rank, world_size, settings.num_workers
        )
    )
    loader = DataLoader(
        Readers(readers, skip_batches),
        batch_size=None,
        num_workers=len(readers) if settings.num_workers else 0,
        collate_fn=_as_is,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),  # its own: the loader would draw from torch's global one
    )
    parts: list[RawBatch] = []
    for part in loader:  # which asks its workers in turn
        if isinstance(part, Failure):
            raise ValueError(part.sentence)
        parts.append(part)
        if len(parts) == len(readers):
            # Captions are encoded here, not in the workers, which then need neither text tokenizer nor its threads.
            yield conditioned(joined(parts), caption_encoder, num_slots)
            parts = []


def _num_slots(recipe: Recipe, manifests: Mapping[str, Manifest]) -> int | None:
    """Of cached text features, the most tokens that a caption may have."""
    if recipe.data.text_features == "live":
        return None
    return max(_text_features(manifest, folder).max_tokens for folder, manifest in manifests.items())


def validation_batches(
    recipe: Recipe, caption_encoder: CaptionEncoder, *, rank: int, world_size: int
) -> Iterator[tuple[int, int, Batch]]:
    """Every sample of data.validation once, over all ranks: (number of the batch, samples that count, batch).

    All ranks get as many batches, as training over several ranks needs; in one that there is nothing left for, none of the
    samples counts. Which samples are in which batch does not depend on the number of ranks. Prompts are never dropped, of
    several crops that of the middle is taken. Raises ValueError naming shard and key of a damaged sample.
    """
    folder, size = recipe.data.validation, recipe.data.validation_batch_size
    manifest = read_manifest(folder, cache_of(recipe))
    _codes(manifest, folder)
    num_slots = _num_slots(recipe, {folder: manifest})
    reader = Reader(
        sets=((folder, manifest, 1),),
        cache=cache_of(recipe),
        seed=0,
        shuffle=size,
        uncond_rate=0.0,
        batch_size=1,
        groups=((0, 1),),
        cached=num_slots is not None,
        skip_errors=False,
        middle_crop=True,
    )
    num_batches = -(-manifest.num_samples // size)
    numbers = range(rank, -(-num_batches // world_size) * world_size, world_size)

    def places(number: int) -> range:
        start = number * size if number < num_batches else 0
        return range(start, min(start + size, manifest.num_samples))

    rows = decode(chain.from_iterable(map(places, numbers)), reader)
    for number in numbers:
        batch = conditioned(collate(list(islice(rows, len(places(number))))), caption_encoder, num_slots)
        yield number, len(batch.codes) if number < num_batches else 0, batch


def shares(
    batch_size: int, grad_accum: int, rank: int, world_size: int, num_workers: int
) -> list[tuple[tuple[int, int], ...]]:
    """Per reader of a rank, its rows of the global batch for each micro batch: first and stop.

    A global batch is its first micro batch, rank after rank, then the second. Readers that would have no row are left out.
    """
    b = batch_size // (world_size * grad_accum)
    starts = [(micro * world_size + rank) * b for micro in range(grad_accum)]
    num_readers = max(1, min(num_workers, b))
    cuts = [b * reader // num_readers for reader in range(num_readers + 1)]
    return [tuple((start + cuts[r], start + cuts[r + 1]) for start in starts) for r in range(num_readers)]


def _as_is(batch: RawBatch | Failure) -> RawBatch | Failure:
    return batch


def _begin_worker(worker: int) -> None:
    release_in_child()
    # Ctrl-C reaches every process of the terminal; the training loop decides what it means.
    # DeepSpeed's launcher answers it with SIGTERM to the whole tree; a worker that died of it would end the rank
    # before it could save.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
