"""Replace every shard of a set, in one process or over the ranks of a launcher
(torchrun, deepspeed).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel
from tqdm import tqdm

from data_tools.storage import note_unlisted
from mmtensorar import ranks
from mmtensorar.data.shards import MANIFEST, Manifest, Sample, Shard, Staging, write_tar

if TYPE_CHECKING:
    import torch

# ---- ranks -----------------------------------------------------------------------------------


def join_ranks() -> None:
    """Join a launcher's process group, if there is one, and share the CPU cores."""
    if ranks.world_size() == 1:
        return
    import torch

    if not torch.distributed.is_initialized():
        # Shards differ in size, so that a rank may wait for hours at the end. A rank
        # that fails ends, and the launcher then ends the others.
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
    if not torch.cuda.is_available():
        torch.set_num_threads(ranks.cores_per_rank())


def wait_for_ranks() -> None:
    """Wait until all ranks have called this."""
    if ranks.world_size() > 1:
        import torch

        torch.distributed.barrier()


def sum_over_ranks(number: int) -> int:
    """The sum of every rank's number. All ranks call this."""
    if ranks.world_size() == 1:
        return number
    import torch

    total = torch.tensor(number)
    torch.distributed.all_reduce(total)
    return int(total)


def print_once(sentence: str) -> None:
    """Print on rank 0."""
    if ranks.is_first():
        print(sentence, flush=True)


def pick_device(name: str | None) -> torch.device:
    """The device of --device; without it, the GPU that a launcher gives this rank.

    Raises ValueError like devices.pick.
    """
    import torch

    from mmtensorar import devices

    local_rank = ranks.local_rank()
    if name is None and local_rank is not None and torch.cuda.is_available():
        name = f"cuda:{local_rank}"
    return devices.pick(name)


# ---- rewriting -------------------------------------------------------------------------------


def check_set(folder: Path) -> None:
    """Raise ValueError, before torch is imported, for a folder that is not a shard
    set.
    """
    # Until an interrupted replacement is finished (read_set), a set has no manifest.
    if not any(folder.glob(f"{Staging.PREFIX}*/{MANIFEST}")):
        Manifest.read(folder, complete=False)


def read_set(folder: Path) -> Manifest:
    """The manifest of a set, after an interrupted replacement is finished.

    All ranks call it.
    """
    if ranks.is_first():
        Staging.recover(folder)
    wait_for_ranks()
    manifest = Manifest.read(folder)
    if ranks.is_first():
        note_unlisted(folder, manifest)
    return manifest


def rewrite(
    folder: Path,
    manifest: Manifest,
    change: Callable[[Shard], Iterator[Sample]],
    *,
    desc: str,
    unit: str,
    **entry: BaseModel,
) -> None:
    """Replace every shard of a set, all at once at the end. All ranks call this.

    An interrupted call resumes when it is made again with an equal manifest and entry,
    on any number of ranks.

    Args:
        folder: Folder of the set.
        manifest: The set's manifest.
        change: A shard -> its new samples.
        desc, unit: Text of the progress bar.
        entry: Fields of the new manifest.
    """
    # The old manifest is part of the purpose, so that shards made from another set are
    # not reused.
    purpose = {key: value.model_dump(mode="json") for key, value in {"set": manifest, **entry}.items()}
    staging = Staging(folder, purpose, clean=ranks.is_first())
    missing = [shard for shard in manifest.shards if staging.finished(shard.name) is None]
    wait_for_ranks()  # no rank writes before all ranks have listed what is missing
    rank, world_size = ranks.rank(), ranks.world_size()
    assigned = missing[rank::world_size]
    total = sum(shard.num_samples for shard in assigned)
    where = f" (rank 0 of {world_size})" if world_size > 1 else ""
    with tqdm(
        desc=desc + where, unit=f" {unit}", total=total, disable=None if ranks.is_first() else True
    ) as progress:

        def counted(samples: Iterator[Sample]) -> Iterator[Sample]:
            for sample in samples:
                yield sample
                progress.update(1)

        for shard in assigned:
            staging.record(write_tar(staging.path / shard.name, counted(change(shard))))
    wait_for_ranks()
    if ranks.is_first():
        shards = tuple(staging.finished(shard.name) for shard in manifest.shards)
        staging.commit(manifest.model_copy(update={"shards": shards, **entry}))
    wait_for_ranks()
