"""Shards -> training batches, as a list of small stages.

    places of the rows (order.py) -> samples -> draws -> codes and caption -> batch -> condition

Which samples a global batch holds, and in which order, depends on the seed and the number of the batch alone, for any
number of ranks and readers: see order.py. A reader is one worker process of one rank; the rows of the rank's share of a
batch are dealt out to its readers, each reads the lanes of its rows, and here they are put together again. What is drawn
for a sample (crop, prompt or none) depends on its position too.

Letters: B rows of a global batch, b rows of a micro batch, T image tokens, F factors, A crops.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
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
from mmtensorar.order import Block, Order
from mmtensorar.recipe import Recipe
from mmtensorar.shards import (
    Codes,
    Manifest,
    Sample,
    TextFeatures,
    check_codes,
    check_features,
    decode_caption,
    decode_codes,
    decode_features,
    read_samples,
    sample_starts,
)

DRAWS = 2  # separates the random numbers of a position from those of order.py


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
    """One of a rank's readers, and all that its stream depends on.

    groups: per micro batch the rows of the global batch that this reader has, first and stop. cached: whether it reads
    text features.
    """

    folder: Path
    manifest: Manifest
    seed: int
    shuffle: int
    uncond_rate: float
    batch_size: int  # B
    groups: tuple[tuple[int, int], ...]
    cached: bool


class Row(NamedTuple):
    """One sample on its way. where: shard and key, for errors. crop, uncond: what was drawn for it."""

    position: int
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
    """What a reader hands over. codes: [n, T, F] uint16. uncond: [n] bool. features: n of them, or of None."""

    codes: np.ndarray
    captions: list[str]
    uncond: np.ndarray
    features: list[np.ndarray | None]


def positions(reader: Reader, skip: int) -> Iterator[int]:
    """Of the reader's rows, micro batch after micro batch, without the first `skip` micro batches."""
    for micro in count(skip):
        step, group = divmod(micro, len(reader.groups))
        for row in range(*reader.groups[group]):
            yield step * reader.batch_size + row


@dataclass
class Lanes:
    """The samples at given positions. Of each lane that it reads from it holds one block, and where its samples begin."""

    reader: Reader
    order: Order
    _blocks: dict[int, tuple[Block, list[Row]]] = field(default_factory=dict)
    _starts: dict[int, np.ndarray] = field(default_factory=dict)

    def __call__(self, positions: Iterator[int]) -> Iterator[Row]:
        for position in positions:
            block, index = self.order.block(position)
            row = position % self.reader.batch_size  # which reads one lane for as long as an epoch lasts
            if row not in self._blocks or self._blocks[row][0] != block:
                self._blocks[row] = block, self._read(block, row)
            yield self._blocks[row][1][index]._replace(position=position)

    def _read(self, block: Block, row: int) -> list[Row]:
        """The rows of a block in the order of giving out."""
        places = self.order.places(block)
        rows: list[Row] = []
        for shard in dict.fromkeys(place.shard for place in places):
            rows += self._read_shard(shard, [place.sample for place in places if place.shard == shard])
        return [rows[index] for index in self.order.given_out(block)]

    def _read_shard(self, number: int, samples: list[int]) -> list[Row]:
        shard = self.reader.manifest.shards[number]
        path = self.reader.folder / shard.name
        if number not in self._starts:
            starts = sample_starts(path)
            if (found := len(starts) - 1) != shard.num_samples:
                raise ValueError(f"{path}: {found} samples, the manifest says {shard.num_samples}; make the shard again")
            self._starts[number] = starts
            while len(self._starts) > 2 * sum(stop - first for first, stop in self.reader.groups) + 2:
                self._starts.pop(next(iter(self._starts)))  # the longest known: lanes go from shard to shard
        # Pictures are not read: training takes codes.
        extensions = ("txt", "codes.npy", *(["t5.npy"] if self.reader.cached else []))
        found = read_samples(path, self._starts[number], samples, extensions)
        return [_row(sample, path, extensions) for sample in found]


def _row(sample: Sample, path: Path, extensions: tuple[str, ...]) -> Row:
    where = f"{path}: sample {sample.key}"
    for extension in extensions:
        if extension not in sample.members:
            raise ValueError(f"{where}: no {extension} member")
    members = sample.members
    return Row(0, where, members["codes.npy"], members["txt"], members.get("t5.npy"))


def draw(rows: Iterator[Row], reader: Reader) -> Iterator[Row]:
    """Choose a crop, and toss the coin for training without the prompt."""
    for row in rows:
        rng = np.random.default_rng([DRAWS, reader.seed, row.position])
        crop = int(rng.integers(reader.manifest.codes.crops))
        yield row._replace(crop=crop, uncond=bool(rng.random() < reader.uncond_rate))


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


def joined(parts: list[RawBatch]) -> RawBatch:
    """The parts that the readers of a rank made of one micro batch."""
    codes, captions, uncond, features = zip(*parts, strict=True)
    return RawBatch(np.concatenate(codes), sum(captions, []), np.concatenate(uncond), sum(features, []))


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
        counts = [shard.num_samples for shard in reader.manifest.shards]
        order = Order(counts, rows=reader.batch_size, seed=reader.seed, shuffle=reader.shuffle)
        first, stop = reader.groups[0]
        batches = wds.DataPipeline(
            partial(positions, reader, self.skip),
            Lanes(reader, order),
            partial(draw, reader=reader),
            partial(decode, manifest=reader.manifest),
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
) -> Iterator[tuple[Tensor, Condition, Tensor]]:
    """Endless micro batches of one rank: codes [b, T, F] int64, condition, uncond [b] bool.

    b is data.batch_size // (world_size * train.grad_accum). skip_batches: micro batches of this rank that are passed over,
    without being read. Raises ValueError naming shard and key at the first damaged sample, and when there are fewer shards
    than readers.
    """
    folder, settings = recipe.data.shards, recipe.data
    manifest = Manifest.read(folder)
    _codes(manifest, folder)
    _check_num_shards(recipe, manifest, world_size)
    cached = settings.text_features == "cached"
    num_slots = _text_features(manifest, folder).max_tokens if cached else None
    readers = tuple(
        Reader(
            folder=Path(folder),
            manifest=manifest,
            seed=recipe.run.seed,
            shuffle=settings.shuffle,
            uncond_rate=settings.uncond_rate,
            batch_size=settings.batch_size,
            groups=groups,
            cached=cached,
        )
        for groups in shares(settings.batch_size, recipe.train.grad_accum, rank, world_size, settings.num_workers)
    )
    loader = DataLoader(
        Readers(readers, skip_batches),
        batch_size=None,
        num_workers=len(readers) if settings.num_workers else 0,
        collate_fn=_as_is,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),  # its own: the loader would draw from torch's global one
    )
    parts: list[RawBatch] = []
    for part in loader:  # which asks its workers in turn
        if isinstance(part, Failure):
            raise ValueError(part.sentence)
        parts.append(part)
        if len(parts) < len(readers):
            continue
        batch, parts = joined(parts), []
        # Captions are encoded here, not in the workers, which then need neither text tokenizer nor its threads.
        if cached:
            condition = left_pad([torch.from_numpy(features) for features in batch.features], num_slots)
        else:
            condition = caption_encoder(batch.captions)
        yield torch.from_numpy(batch.codes.astype(np.int64)), condition, torch.from_numpy(batch.uncond)


def shares(batch_size: int, grad_accum: int, rank: int, world_size: int, num_workers: int) -> list[tuple[tuple[int, int], ...]]:
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


def _ignore_interrupts(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal; the training loop decides what it means.
    # DeepSpeed's launcher answers it with SIGTERM to the whole tree; a worker that died of it would end the rank
    # before it could save.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
