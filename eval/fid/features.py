"""Features of many pictures, stored on disk batch by batch, so that an interrupted run
resumes.

A batch's file is named by the hash of its pictures and of the network's name, so that
it is never used for other pictures.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eval.fid.sources import DAMAGE, Pictures
from mmtensorar.files import atomic_path

KINDS = ("pool", "spatial", "logits")


def extract(
    pictures: Pictures, network: Callable, name: str, folder: Path, batch_size: int
) -> dict[str, np.ndarray]:
    """pool, spatial and logits of all pictures, each [N, C] float32.

    One batch of pictures is in memory, and all features (20 KB a picture).

    Args:
        pictures: to describe.
        network: [B, H, W, 3] uint8 -> an object with the three features.
        name: the network's, with a hash of its weights.
        folder: where features are stored.
        batch_size: pictures at a time.

    Raises ValueError for pictures that cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    batches = []
    with tqdm(total=pictures.num, unit="image", desc=f"features of {pictures.name}", file=sys.stderr) as bar:
        for batch in pictures.batches(batch_size):
            batches.append(_batch(batch, network, name, folder))
            bar.update(len(batch))
    return {kind: np.concatenate([batch[kind] for batch in batches]) for kind in KINDS}


def _batch(batch: np.ndarray, network: Callable, name: str, folder: Path) -> dict[str, np.ndarray]:
    digest = hashlib.sha256(f"{name} {batch.shape}".encode())
    digest.update(np.ascontiguousarray(batch))
    path = folder / f"{digest.hexdigest()[:32]}.npz"
    if path.is_file():
        try:
            with np.load(path, allow_pickle=False) as file:
                return {kind: file[kind] for kind in KINDS}
        except DAMAGE:
            path.unlink()  # it is computed again
    features = network(batch)
    arrays = {kind: getattr(features, kind) for kind in KINDS}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
    return arrays
