"""Shards -> training batches, as a list of small stages.

    shard list, shuffled by (seed, epoch) -> every num_readers-th of it -> samples -> shuffle buffer -> draws
    -> pass over what a resumed run has seen -> codes and caption -> batch -> condition

A reader is one worker process of one rank. It goes through its share of the shards again and again; shards are
never divided, so in one epoch readers may see slightly different numbers of samples, and a batch may reach over
the end of an epoch. What a rank receives is a pure function of (recipe, rank, world_size): `skip_batches=n` gives
exactly the batches after the first n. Changing data.num_workers changes the order.

Letters: b rows of a micro batch, T image tokens, F factors, A crops.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmtensorar import backbones
from mmtensorar.backbones import CaptionEncoder, Condition
from mmtensorar.captions import ClassNumbers, T5Features, encoder_hash, left_pad
from mmtensorar.recipe import Recipe
from mmtensorar.shards import (
    Codes,
    Manifest,
    Shard,
    TextFeatures,
    check_codes,
    check_features,
    decode_caption,
    decode_codes,
    decode_features,
    iterate_shard,
)

# Separate the random streams that share seed, epoch and reader.
SHARD_ORDER, DRAWS = 0, 1


# ---- before training -------------------------------------------------------------------------


def preflight(recipe: Recipe, image_tokenizer, *, world_size: int) -> str:
    """The fingerprint of the shards.

    Raises ValueError, naming both sides, when they do not fit the recipe's image tokenizer, backbone or ranks.
    """
    folder = recipe.data.shards
    manifest = Manifest.read(folder)
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
    _check_num_shards(recipe, manifest, world_size)
    if manifest.classes is not None or recipe.data.text_features == "cached":
        _check_condition(recipe, manifest, backbones.caption_encoder(recipe.backbone))
    return manifest.fingerprint


def _codes(manifest: Manifest, folder: str) -> Codes:
    if manifest.codes is None:
        raise ValueError(f"{folder} has no image codes; run data_tools/encode_codes.py on it")
    return manifest.codes


def _check_condition(recipe: Recipe, manifest: Manifest, caption_encoder: CaptionEncoder) -> None:
    """Raise ValueError unless the shards' classes or cached features are those that the backbone takes."""
    folder, backbone = recipe.data.shards, recipe.backbone.name
    if (classes := manifest.classes) is not None:
        if not isinstance(caption_encoder, ClassNumbers):
            raise ValueError(f"{folder} holds images of numbered classes, but the {backbone} backbone takes captions")
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
        pairs["text encoder"] = (f"{text.text_encoder} {text.weight_hash[:12]}", f"{encoder.path} {found[:12]}")
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


def _check_num_shards(recipe: Recipe, manifest: Manifest, world_size: int) -> None:
    workers = max(1, recipe.data.num_workers)
    if len(manifest.shards) < world_size * workers:
        raise ValueError(
            f"{recipe.data.shards} has {len(manifest.shards)} shards, too few for {world_size} ranks x {workers} readers "
            "each; lower data.num_workers, or make the shards with a smaller --samples-per-shard"
        )


# ---- stages ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """One of num_readers, and all that its stream depends on. cached: whether it reads text features."""

    folder: Path
    manifest: Manifest
    seed: int
    shuffle: int
    uncond_rate: float
    batch_size: int
    number: int
    num_readers: int
    cached: bool


class Row(NamedTuple):
    """One sample on its way. where: shard and key, for errors. crop, uncond: what was drawn for it."""

    where: str
    codes: bytes
    caption: bytes
    features: bytes | None
    crop: int = 0
    uncond: bool = False


class Decoded(NamedTuple):
    """One row of a batch. codes: [T, F] uint16. features: [tokens, C] float16 when they are cached."""

    codes: np.ndarray
    caption: str
    uncond: bool
    features: np.ndarray | None


class RawBatch(NamedTuple):
    """What a reader hands over. codes: [b, T, F] uint16. uncond: [b] bool. features: b of them, or of None."""

    codes: np.ndarray
    captions: list[str]
    uncond: np.ndarray
    features: list[np.ndarray | None]


def shard_list(reader: Reader, epoch: int) -> list[Shard]:
    """The reader's shards of an epoch, in order. Over all readers: every shard once."""
    order = np.random.default_rng([SHARD_ORDER, reader.seed, epoch]).permutation(len(reader.manifest.shards))
    return [reader.manifest.shards[i] for i in order[reader.number :: reader.num_readers]]


def read(shards: Iterator[Shard], folder: Path, *, cached: bool) -> Iterator[Row]:
    for shard in shards:
        for sample in iterate_shard(folder, shard):
            where = f"{folder / shard.name}: sample {sample.key}"
            for extension in ("txt", "codes.npy", *(["t5.npy"] if cached else [])):
                if extension not in sample.members:
                    raise ValueError(f"{where}: no {extension} member")
            # The picture is dropped here: the shuffle buffer holds what training takes only.
            features = sample.members["t5.npy"] if cached else None
            yield Row(where, sample.members["codes.npy"], sample.members["txt"], features)


def draw(rows: Iterator[Row], reader: Reader, epoch: int) -> Iterator[Row]:
    """Choose a crop, and toss the coin for training without the prompt."""
    rng = np.random.default_rng([DRAWS, reader.seed, epoch, reader.number])
    for row in rows:
        crop = int(rng.integers(reader.manifest.codes.crops))
        yield row._replace(crop=crop, uncond=bool(rng.random() < reader.uncond_rate))


def one_epoch(reader: Reader, epoch: int, skip: int) -> wds.DataPipeline:
    """The reader's rows of an epoch, without the first `skip` (which are read, for the buffer, but not decoded)."""
    shuffled = random.Random(f"{reader.seed}/{epoch}/{reader.number}")
    return wds.DataPipeline(
        partial(iter, shard_list(reader, epoch)),
        partial(read, folder=reader.folder, cached=reader.cached),
        wds.shuffle(reader.shuffle, initial=reader.shuffle, rng=shuffled) if reader.shuffle else None,
        partial(draw, reader=reader, epoch=epoch),
        wds.slice(skip, None),
    )


def endless(reader: Reader, skip: int) -> Iterator[Row]:
    """Epoch after epoch, without the first `skip` rows; whole epochs are passed over by arithmetic."""
    for epoch in count():
        num_rows = sum(shard.num_samples for shard in shard_list(reader, epoch))
        if skip < num_rows:
            yield from one_epoch(reader, epoch, skip)
        skip = max(0, skip - num_rows)


def decode(rows: Iterator[Row], manifest: Manifest) -> Iterator[Decoded]:
    for row in rows:
        crops = decode_codes(row.codes, row.where)  # [A, T, F]
        check_codes(crops, manifest.codes, row.where)
        features = None
        if row.features is not None:
            features = decode_features(row.features, row.where)
            check_features(features, manifest.text_features, row.where)
        yield Decoded(crops[row.crop], decode_caption(row.caption, row.where), row.uncond, features)


def collate(rows: list[Decoded]) -> RawBatch:
    codes, captions, uncond, features = zip(*rows, strict=True)
    return RawBatch(np.stack(codes), list(captions), np.array(uncond, dtype=bool), list(features))


# ---- the stream ------------------------------------------------------------------------------


class Failure(NamedTuple):
    """A sentence on its way out of a worker, where an exception would come out wrapped in a traceback."""

    sentence: str


@dataclass(frozen=True)
class Readers(IterableDataset):
    """All readers of one rank: worker w of a DataLoader iterates over one of them.

    skip: batches of the rank, not of the reader. DataLoader asks its workers in turn, so batch i is of reader
    i % len(readers), and after a skip the turn starts at another one.
    """

    readers: tuple[Reader, ...]
    skip: int

    def __iter__(self) -> Iterator[RawBatch | Failure]:
        worker = get_worker_info()
        turns, index = divmod(self.skip + (worker.id if worker else 0), len(self.readers))
        reader = self.readers[index]
        batches = wds.DataPipeline(
            partial(endless, reader, turns * reader.batch_size),
            partial(decode, manifest=reader.manifest),
            wds.batched(reader.batch_size, collation_fn=collate, partial=False),
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
) -> Iterator[tuple[Tensor, Condition, Tensor]]:
    """Endless micro batches of one rank: codes [b, T, F] int64, condition, uncond [b] bool.

    b is data.batch_size // (world_size * train.grad_accum). Raises ValueError naming shard and key at the first
    damaged sample, and when there are fewer shards than readers.
    """
    folder, settings = recipe.data.shards, recipe.data
    manifest = Manifest.read(folder)
    _codes(manifest, folder)
    _check_num_shards(recipe, manifest, world_size)
    cached = settings.text_features == "cached"
    num_slots = _text_features(manifest, folder).max_tokens if cached else None
    workers = max(1, settings.num_workers)
    readers = tuple(
        Reader(
            folder=Path(folder),
            manifest=manifest,
            seed=recipe.run.seed,
            shuffle=settings.shuffle,
            uncond_rate=settings.uncond_rate,
            batch_size=settings.batch_size // (world_size * recipe.train.grad_accum),
            number=rank * workers + worker,
            num_readers=world_size * workers,
            cached=cached,
        )
        for worker in range(workers)
    )
    loader = DataLoader(
        Readers(readers, skip_batches),
        batch_size=None,
        num_workers=settings.num_workers,
        collate_fn=_as_is,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),  # its own: the loader would draw from torch's global one
    )
    for batch in loader:
        if isinstance(batch, Failure):
            raise ValueError(batch.sentence)
        # Captions are encoded here, not in the workers, which then need neither text tokenizer nor its threads.
        if cached:
            condition = left_pad([torch.from_numpy(features) for features in batch.features], num_slots)
        else:
            condition = caption_encoder(batch.captions)
        yield torch.from_numpy(batch.codes.astype(np.int64)), condition, torch.from_numpy(batch.uncond)


def _as_is(batch: RawBatch | Failure) -> RawBatch | Failure:
    return batch


def _ignore_interrupts(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal; the training loop decides what it means.
    # DeepSpeed's launcher answers it with SIGTERM to the whole tree; a worker that died of it would end the rank
    # before it could save.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
