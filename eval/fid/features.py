"""Features of many pictures, kept on disk batch by batch, so that an interrupted run goes on where it stopped.

A batch's file is named by the hash of its pictures and of the network's name: it is never taken for that of others.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eval.fid.sources import DAMAGE, Pictures

KINDS = ("pool", "spatial", "logits")


def extract(
    pictures: Pictures, network: Callable, name: str, folder: Path, batch_size: int
) -> dict[str, np.ndarray]:
    """pool, spatial and logits of all pictures, [N, C] float32.

    network: [B, H, W, 3] uint8 -> an object with those three; name: the network's, with its weights' hash. folder: where
    features are kept. One batch of pictures is in memory, and all features (20 KB a picture). Raises ValueError for
    pictures that cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    with tqdm(total=pictures.num, unit="image", desc=f"features of {pictures.name}", file=sys.stderr) as bar:
        for batch in pictures.batches(batch_size):
            found.append(_batch(batch, network, name, folder))
            bar.update(len(batch))
    return {kind: np.concatenate([batch[kind] for batch in found]) for kind in KINDS}


def _batch(batch: np.ndarray, network: Callable, name: str, folder: Path) -> dict[str, np.ndarray]:
    digest = hashlib.sha256(f"{name} {batch.shape}".encode())
    digest.update(np.ascontiguousarray(batch))
    path = folder / f"{digest.hexdigest()[:32]}.npz"
    if path.is_file():
        try:
            with np.load(path, allow_pickle=False) as file:
                return {kind: file[kind] for kind in KINDS}
        except DAMAGE:
            path.unlink()  # damaged: computed again
    features = network(batch)
    found = {kind: getattr(features, kind) for kind in KINDS}
    partial = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    np.savez(partial, **found)
    os.replace(partial, path)
    return found
