"""Training batches from shards, in small stages.

    positions -> stored samples (shard_mixture.py, sample_order.py) -> decoded -> micro batch -> condition

Which samples a global batch holds, and in which order, depends only on the seed and the
batch's number, for any number of ranks and workers: see sample_order.py. Each rank has
several workers (processes); the rank's rows of a batch are divided among them, each
worker reads the lanes of its rows, and the parts are put together here. What is drawn
for a sample (its crop, and whether its prompt is dropped) depends on its position too.

Letters: B rows of a global batch, b rows of a micro batch, T image tokens, F factors, A
crops.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.filters import batched
from webdataset.pipeline import DataPipeline

from mmtensorar.captions.encoders import T5Features, left_pad
from mmtensorar.captions.limits import excesses
from mmtensorar.data.members import (
    check_codes,
    check_features,
    decode_caption,
    decode_codes,
    decode_features,
)
from mmtensorar.data.shard_mixture import (
    LaneReader,
    StoredSample,
    apportion_rows,
    codes_of,
    read_manifest,
    read_manifests,
    shard_cache,
    shard_sets,
    text_features_of,
)
from mmtensorar.data.shards import Manifest
from mmtensorar.data.url_cache import Cache
from mmtensorar.model.conditions import CaptionEncoder, Condition
from mmtensorar.processes import release_in_child
from mmtensorar.recipe import Data, Recipe

NO_TEXT_TOKENS = 2  # cached features of up to so many may be of an emptied caption
DRAWS = 2  # separates the random numbers of a position from those of sample_order.py


# ---- how long an epoch is --------------------------------------------------------------------


def epoch_samples(data: Data) -> int:
    """Samples of all training sets together."""
    return sum(manifest.num_samples for manifest in read_manifests(data).values())


def steps_of(recipe: Recipe) -> int:
    """Optimizer steps in the recipe's train.epochs, which must be set."""
    assert recipe.train.epochs is not None
    return max(1, int(recipe.train.epochs * epoch_samples(recipe.data) / recipe.data.batch_size))


# ---- stages ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class WorkerSettings:
    """The settings of one worker of one rank; they determine its whole stream.

    sets: folder, manifest and rows of each shard set. row_ranges: for each micro batch
    of a step, first and stop of this worker's rows in the global batch. use_features:
    read text features. skip_errors: replace a damaged sample by the next undamaged one.
    middle_crop: take the middle crop instead of a random one. long_prompts: whose long
    prompts are damage; None if they are cut.
    """

    sets: tuple[tuple[str, Manifest, int], ...]
    cache: Cache
    seed: int
    shuffle: int
    uncond_rate: float
    batch_size: int  # B
    row_ranges: tuple[tuple[int, int], ...]
    use_features: bool
    skip_errors: bool
    middle_crop: bool = False
    long_prompts: CaptionEncoder | None = None

    @property
    def extensions(self) -> tuple[str, ...]:
        """The members that are read; training needs no pictures."""
        return ("txt", "codes.npy", "t5.npy") if self.use_features else ("txt", "codes.npy")

    def lane_reader(self) -> LaneReader:
        sets = shard_sets(self.sets, seed=self.seed, shuffle=self.shuffle, cache=self.cache)
        return LaneReader(sets, self.extensions, 2 * sum(stop - first for first, stop in self.row_ranges) + 2)


class DecodedSample(NamedTuple):
    """One row of a batch.

    name: shard and key. codes: [T, F] uint16. features: [tokens, C] float16, None
    unless they are cached. skipped: what was wrong with the sample that this one
    replaces.
    """

    name: str
    codes: np.ndarray
    caption: str
    uncond: bool
    features: np.ndarray | None
    skipped: str | None


class RawBatch(NamedTuple):
    """A worker's n rows of a micro batch. codes: [n, T, F] uint16. uncond: [n] bool."""

    codes: np.ndarray
    captions: list[str]
    uncond: np.ndarray
    features: list[np.ndarray | None]
    names: list[str]
    skipped: list[str]


class Batch(NamedTuple):
    """A micro batch. codes: [b, T, F] int64. condition: b rows. uncond: [b] bool.

    names: shard and key of each row. skipped: one sentence for each damaged sample.
    cut: one sentence for each prompt that was too long.
    """

    codes: Tensor
    condition: Condition
    uncond: Tensor
    names: tuple[str, ...]
    skipped: tuple[str, ...]
    cut: tuple[str, ...] = ()


def positions(settings: WorkerSettings, skip: int) -> Iterator[int]:
    """Positions of the worker's rows, one micro batch after the other, from number
    `skip` on.
    """
    for micro in count(skip):
        step, number = divmod(micro, len(settings.row_ranges))
        for row in range(*settings.row_ranges[number]):
            yield step * settings.batch_size + row


def decode_samples(positions: Iterable[int], settings: WorkerSettings) -> Iterator[DecodedSample]:
    """The sample at each position, with a random crop; its prompt is dropped at random.

    Raises ValueError naming shard and key of a damaged one, unless another replaces it.
    """
    lanes = settings.lane_reader()
    for position in positions:
        rng = np.random.default_rng([DRAWS, settings.seed, position])
        crop, uncond = rng.random(), bool(rng.random() < settings.uncond_rate)
        skipped = None
        for stored in lanes.candidates(position):
            try:
                if isinstance(stored, ValueError):
                    raise stored
                yield _decode_sample(stored, settings, crop, uncond)._replace(skipped=skipped)
                break
            except ValueError as error:
                if not settings.skip_errors:
                    raise
                skipped = skipped or str(error)
        else:
            raise ValueError(f"{skipped}; and no undamaged sample of the set can replace it")


def _decode_sample(
    stored: StoredSample, settings: WorkerSettings, crop: float, uncond: bool
) -> DecodedSample:
    """Decode a sample. crop: in [0, 1), selects one of its crops."""
    members, manifest = stored.sample.members, stored.shard_set.manifest
    for extension in settings.extensions:
        if extension not in members:
            raise ValueError(f"{stored.where}: no {extension} member")
    crops = decode_codes(members["codes.npy"], stored.where)  # [A, T, F]
    check_codes(crops, codes_of(manifest, stored.where), stored.where)
    features = None
    if settings.use_features:
        features = decode_features(members["t5.npy"], stored.where)
        check_features(features, text_features_of(manifest, stored.where), stored.where)
    caption = decode_caption(members["txt"], stored.where)
    if settings.long_prompts is not None and (excess := settings.long_prompts.excess(caption)):
        raise ValueError(f"{stored.where}: the prompt has {excess}, and data.long_prompts is refuse")
    # With corners, the middle comes after the four of them; mirror images come last.
    middle = 4 if len(crops) >= 5 else 0
    number = middle if settings.middle_crop else int(crop * len(crops))
    return DecodedSample(stored.where, crops[number], caption, uncond, features, None)


def collate(rows: list[DecodedSample]) -> RawBatch:
    """Rows -> one batch."""
    names, codes, captions, uncond, features, skipped = zip(*rows, strict=True)
    sentences = [sentence for sentence in skipped if sentence]
    return RawBatch(
        np.stack(codes), list(captions), np.array(uncond, dtype=bool), list(features), list(names), sentences
    )


def merge_parts(parts: list[RawBatch]) -> RawBatch:
    """One micro batch from its parts, which a rank's workers have read."""
    codes, captions, uncond, features, names, skipped = zip(*parts, strict=True)
    return RawBatch(
        np.concatenate(codes),
        sum(captions, []),
        np.concatenate(uncond),
        sum(features, []),
        sum(names, []),
        sum(skipped, []),
    )


def add_condition(batch: RawBatch, caption_encoder: CaptionEncoder, num_slots: int | None) -> Batch:
    """Encode the captions.

    num_slots: P of cached text features, None to use the encoder.
    """
    cut: tuple[str, ...] = ()
    if num_slots is not None:
        # With cached features every row has some: _decode_sample requires the member.
        features = [torch.from_numpy(row) for row in batch.features if row is not None]
        condition = left_pad(features, num_slots)
        if isinstance(caption_encoder, T5Features):
            for name, caption, row in zip(batch.names, batch.captions, features, strict=True):
                if len(row) <= NO_TEXT_TOKENS:
                    caption_encoder.emptied.add(name, caption)
    else:
        condition = caption_encoder(batch.captions)
        cut = tuple(
            f"{batch.names[row]}: the prompt has {excess}, so it is cut"
            for row, excess in excesses(caption_encoder, batch.captions)
        )
    codes, uncond = torch.from_numpy(batch.codes.astype(np.int64)), torch.from_numpy(batch.uncond)
    return Batch(codes, condition, uncond, tuple(batch.names), tuple(batch.skipped), cut)


# ---- the stream ------------------------------------------------------------------------------


class WorkerError(NamedTuple):
    """The message of an error in a worker.

    A DataLoader would wrap an exception in a traceback.
    """

    sentence: str


@dataclass(frozen=True)
class WorkerDataset(IterableDataset):
    """All workers of one rank: worker w of a DataLoader iterates over workers[w].

    skip: micro batches that are passed over first.
    """

    workers: tuple[WorkerSettings, ...]
    skip: int

    def __iter__(self) -> Iterator[RawBatch | WorkerError]:
        worker = get_worker_info()
        settings = self.workers[worker.id if worker else 0]
        first, stop = settings.row_ranges[0]
        batches = DataPipeline(
            partial(positions, settings, self.skip),
            partial(decode_samples, settings=settings),
            batched(stop - first, collation_fn=collate, partial=False),
        )
        try:
            yield from batches
        except (ValueError, OSError) as error:
            yield WorkerError(str(error))


def stream(
    recipe: Recipe,
    caption_encoder: CaptionEncoder,
    *,
    rank: int,
    world_size: int,
    skip_batches: int = 0,
) -> Iterator[Batch]:
    """Endless micro batches of one rank.

    Each has b = data.batch_size // (world_size * train.grad_accum) rows.

    Args:
        recipe: Its sections data, run and train are read.
        caption_encoder: Unused with cached text features.
        rank, world_size: Of this process among all.
        skip_batches: Micro batches of this rank that are passed over without being
            read.

    Raises ValueError naming shard and key at the first damaged sample, unless
    data.on_error is skip.
    """
    data = recipe.data
    manifests = read_manifests(data)
    rows = apportion_rows(data.weights, data.batch_size)
    num_slots = _num_slots(data.text_features, manifests)
    workers = tuple(
        WorkerSettings(
            sets=tuple((folder, manifest, rows[folder]) for folder, manifest in manifests.items()),
            cache=shard_cache(data),
            seed=recipe.run.seed,
            shuffle=data.shuffle,
            uncond_rate=data.uncond_rate,
            batch_size=data.batch_size,
            row_ranges=row_ranges,
            use_features=num_slots is not None,
            skip_errors=data.on_error == "skip",
            long_prompts=caption_encoder if data.long_prompts == "refuse" else None,
        )
        for row_ranges in worker_rows(
            data.batch_size, recipe.train.grad_accum, rank, world_size, data.num_workers
        )
    )
    loader = DataLoader(
        WorkerDataset(workers, skip_batches),
        batch_size=None,
        num_workers=len(workers) if data.num_workers else 0,
        collate_fn=_as_is,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),  # otherwise the loader would draw from torch's global one
    )
    parts: list[RawBatch] = []
    for part in loader:  # the DataLoader asks its workers in turn
        if isinstance(part, WorkerError):
            raise ValueError(part.sentence)
        parts.append(part)
        if len(parts) == len(workers):
            # Captions are encoded here, so that workers need no text tokenizer with its
            # threads.
            yield add_condition(merge_parts(parts), caption_encoder, num_slots)
            parts = []


def _num_slots(text_features: str, manifests: Mapping[str, Manifest]) -> int | None:
    """The most tokens that a caption of cached text features may have, None when they
    are live.
    """
    if text_features == "live":
        return None
    return max(text_features_of(manifest, folder).max_tokens for folder, manifest in manifests.items())


def validation_batches(
    recipe: Recipe, caption_encoder: CaptionEncoder, *, rank: int, world_size: int
) -> Iterator[tuple[int, int, Batch]]:
    """Every sample of data.validation once, over all ranks.

    Yields (number of the batch, samples that count, batch). All ranks get the same
    number of batches; the surplus ones, for which no samples are left, count no
    samples. Which samples are in which batch does not depend on the number of ranks.
    Prompts are never dropped, and of several crops the middle one is taken.

    Raises ValueError naming shard and key of a damaged sample.
    """
    data = recipe.data
    folder, size = data.validation, data.validation_batch_size
    if folder is None:
        raise ValueError("data.validation is not set; expected a shard folder")
    cache = shard_cache(data)
    manifest = read_manifest(folder, cache)
    codes_of(manifest, folder)
    num_slots = _num_slots(data.text_features, {folder: manifest})
    settings = WorkerSettings(
        sets=((folder, manifest, 1),),
        cache=cache,
        seed=0,
        shuffle=size,
        uncond_rate=0.0,
        batch_size=1,
        row_ranges=((0, 1),),
        use_features=num_slots is not None,
        skip_errors=False,
        middle_crop=True,
        long_prompts=caption_encoder if data.long_prompts == "refuse" else None,
    )
    num_batches = -(-manifest.num_samples // size)
    numbers = range(rank, -(-num_batches // world_size) * world_size, world_size)

    def positions_of(number: int) -> range:
        start = number * size if number < num_batches else 0
        return range(start, min(start + size, manifest.num_samples))

    samples = decode_samples(chain.from_iterable(map(positions_of, numbers)), settings)
    for number in numbers:
        rows = list(islice(samples, len(positions_of(number))))
        batch = add_condition(collate(rows), caption_encoder, num_slots)
        yield number, len(batch.codes) if number < num_batches else 0, batch


def worker_rows(
    batch_size: int, grad_accum: int, rank: int, world_size: int, num_workers: int
) -> list[tuple[tuple[int, int], ...]]:
    """For each worker of a rank: first and stop of its rows in each micro batch of a
    step.

    A global batch is the first micro batch of rank 0, of rank 1, ..., then the second
    of rank 0, and so on. Workers that would have no row are left out.
    """
    b = batch_size // (world_size * grad_accum)
    starts = [(micro * world_size + rank) * b for micro in range(grad_accum)]
    num_used = max(1, min(num_workers, b))
    cuts = [b * worker // num_used for worker in range(num_used + 1)]
    return [tuple((start + cuts[w], start + cuts[w + 1]) for start in starts) for w in range(num_used)]


def _as_is(item: Any) -> Any:
    return item


def _begin_worker(worker: int) -> None:
    release_in_child()
    # A worker ignores both signals; the training loop handles them. Ctrl-C reaches
    # every process of the terminal, and DeepSpeed's launcher then sends SIGTERM to all
    # of them. A worker that died would end the rank before it could save.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
