"""The ranks of a run: process group, collectives, and errors that must reach every
rank.

mmtensorar/ranks.py reads from the environment which rank a process is. This file needs
no DeepSpeed.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

from mmtensorar import ranks
from mmtensorar.words import sentence_of

# Limit of one collective operation: DeepSpeed's environment variable and its default.
TIMEOUT = timedelta(minutes=int(os.environ.get("DEEPSPEED_TIMEOUT", "10")))

Result = TypeVar("Result")


def start_process_group(local_rank: int) -> tuple[int, int, torch.device]:
    """Join the ranks; returns (rank, world size, this rank's device).

    NCCL on GPUs, gloo on CPUs. Without a launcher the world size is 1. Also limits the
    threads of ranks that share a machine's cores.

    local_rank: the launcher's --local_rank, for launchers that do not set LOCAL_RANK.
    """
    defaults = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": str(max(0, local_rank)),
        "MASTER_ADDR": "127.0.0.1",
    }
    if "RANK" not in os.environ and "MASTER_PORT" not in os.environ:
        # A fixed port would make two runs on one machine collide.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            defaults["MASTER_PORT"] = str(probe.getsockname()[1])
    for name, value in (defaults | {"MASTER_PORT": defaults.get("MASTER_PORT", "29500")}).items():
        os.environ.setdefault(name, value)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", ranks.local_rank() or 0)
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(ranks.cores_per_rank())
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        # Bound to its device from the start, as DeepSpeed does; a single rank needs no
        # connection.
        bound = device if device.type == "cuda" and ranks.world_size() > 1 else None
        torch.distributed.init_process_group(backend, timeout=TIMEOUT, device_id=bound)
    return torch.distributed.get_rank(), torch.distributed.get_world_size(), device


def stop_process_group() -> None:
    """Leave the process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def print_on_first(sentence: str) -> None:
    """Print a sentence on rank 0 only."""
    if ranks.is_first():
        print(sentence, flush=True)


def barrier() -> None:
    """Wait for all ranks."""
    torch.distributed.barrier()


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of values [N] over all ranks, in place."""
    torch.distributed.all_reduce(values)
    return values.div_(torch.distributed.get_world_size())


def gather_lists(items: list[str]) -> list[str]:
    """The items of all ranks, rank after rank, on every rank."""
    gathered: list[list[str]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, items)
    return sum(gathered, [])


def on_all_ranks(work: Callable[[], Result], device: torch.device) -> Result:
    """Run work() on every rank and return its result.

    If it raises ValueError or OSError on any rank, every rank raises ValueError with
    the messages of all, so that no rank hangs in a collective. Work for one rank alone
    is `lambda: f() if rank == 0 else None`.
    """
    result, failure = None, None
    try:
        result = work()
    except (ValueError, OSError) as error:
        failure = sentence_of(error)
    failed = torch.tensor([float(failure is not None)], device=device)
    torch.distributed.all_reduce(failed)
    if failed.item():
        sentences: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(sentences, failure)
        raise ValueError("; ".join(dict.fromkeys(sentence for sentence in sentences if sentence)))
    return result  # type: ignore[return-value]  # what work returned, since it did not raise
