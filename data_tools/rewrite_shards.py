"""Replacing every shard of a set by a changed one, alone or over the ranks of a launcher (torchrun, deepspeed)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
from pydantic import BaseModel
from tqdm import tqdm

from mmtensorar import devices
from mmtensorar.data.shards import (
    Manifest,
    Sample,
    Shard,
    Staging,
    write_tar,
)


class Ranks:
    """The processes that share the work. Under no launcher it is one."""

    def __init__(self) -> None:
        self.rank, self.size = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
        )
        if self.size > 1 and not torch.distributed.is_initialized():
            # Shards differ in size, so that one rank may wait for hours at the end. A rank that fails ends, and the
            # launcher then ends the others.
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
        if self.size > 1 and not torch.cuda.is_available():
            here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all ranks have come here."""
        if self.size > 1:
            torch.distributed.barrier()

    def say(self, sentence: str) -> None:
        if self.first:
            print(sentence, flush=True)


def device(name: str | None) -> torch.device:
    """The device of --device; without it the GPU that a launcher gives this rank. Raises ValueError like devices.pick."""
    if name is None and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    return devices.pick(name)


def read_set(folder: Path, ranks: Ranks) -> Manifest:
    """The manifest of a set, after a replacement that was cut off is finished."""
    if ranks.first:
        Staging.recover(folder)
    ranks.wait()
    return Manifest.read(folder)


def rewrite(
    folder: Path,
    manifest: Manifest,
    change: Callable[[Shard], Iterator[Sample]],
    ranks: Ranks,
    *,
    desc: str,
    unit: str,
    **entry: BaseModel,
) -> None:
    """Replace every shard of a set by change(shard), all at once at the end, and the manifest's entry with them.

    An interrupted call goes on where it stopped when it is made again with an equal manifest and entry, on any number of
    ranks. All ranks call it.
    """
    # The source set is part of the purpose: shards made from another set are not picked up.
    purpose = {key: value.model_dump(mode="json") for key, value in {"set": manifest, **entry}.items()}
    staging = Staging(folder, purpose, clean=ranks.first)
    missing = [shard for shard in manifest.shards if staging.finished(shard.name) is None]
    ranks.wait()  # nobody writes before everybody has looked
    own = missing[ranks.rank :: ranks.size]
    total = sum(shard.num_samples for shard in own)
    where = f" (rank 0 of {ranks.size})" if ranks.size > 1 else ""
    with tqdm(
        desc=desc + where, unit=f" {unit}", total=total, disable=None if ranks.first else True
    ) as progress:

        def counted(samples: Iterator[Sample]) -> Iterator[Sample]:
            for sample in samples:
                yield sample
                progress.update(1)

        for shard in own:
            staging.record(write_tar(staging.path / shard.name, counted(change(shard))))
    ranks.wait()
    if ranks.first:
        shards = tuple(staging.finished(shard.name) for shard in manifest.shards)
        staging.commit(manifest.model_copy(update={"shards": shards, **entry}))
    ranks.wait()
