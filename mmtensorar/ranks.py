"""Rank and world size, from the environment variables that launchers set.

The launchers are torchrun and deepspeed.
"""

from __future__ import annotations

import os


def rank() -> int:
    """Number of this process among all, from 0; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is rank 0: the one that prints and writes."""
    return rank() == 0


def local_rank() -> int | None:
    """Number of this process on its machine; None without a launcher."""
    value = os.environ.get("LOCAL_RANK")
    return None if value is None else int(value)


def device(name: str | None) -> str | None:
    """Name of the device for this process; under a launcher, unless given, the GPU of
    its local rank.
    """
    number = local_rank()
    if name is not None or number is None:
        return name
    import torch

    return f"cuda:{number}" if torch.cuda.is_available() else "cpu"


def local_world_size() -> int:
    """Number of processes on this machine.

    torchrun and DeepSpeed's launcher use different variables.
    """
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def cores_per_rank() -> int:
    """CPU cores for each process of this machine, at least 1.

    If every rank uses all cores, the ranks slow each other down: on two cores, two such
    ranks trained at 1,000 to 3,100 tokens/s together, and one process alone at 5,500.
    """
    return max(1, (os.cpu_count() or 1) // local_world_size())
