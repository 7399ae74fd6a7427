"""Score recorded Inception features.

    python -m eval.fid score --features features.npz [--split-size 5000] [--out FILE]

The file holds float arrays: ref_pool [N, C] and sample_pool [M, C] for FID, precision and recall, ref_spatial and
sample_spatial for sFID, sample_logits [M, V] for the Inception score. Making features of pictures is not built yet.
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from eval import layout
from eval.fid import score

ARRAYS = ("ref_pool", "sample_pool", "ref_spatial", "sample_spatial", "sample_logits")


def read_features(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file. Raises ValueError naming it, and the array that is damaged, of another shape or not finite."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ARRAYS if name in file.files}
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not an .npz of arrays ({error})") from None
    for name, array in arrays.items():
        if array.ndim != 2 or array.dtype.kind != "f":
            raise ValueError(f"{path}: {name} is {array.dtype} of shape {list(array.shape)}; expected floats [N, C]")
        if not np.isfinite(array).all():
            raise ValueError(f"{path}: {name} has numbers that are not finite")
    return arrays


def measure(arrays: Mapping[str, np.ndarray], split_size: int = score.SPLIT_SIZE) -> dict[str, float]:
    """The metrics that the arrays allow, by name. Raises ValueError when they allow none."""
    found = {}
    for name, kind in (("fid", "pool"), ("sfid", "spatial")):
        if {f"ref_{kind}", f"sample_{kind}"} <= arrays.keys():
            samples, reference = (score.statistics(arrays[f"{side}_{kind}"]) for side in ("sample", "ref"))
            found[name] = score.frechet_distance(samples, reference)
    if "sample_logits" in arrays:
        found["inception_score"] = score.inception_score(arrays["sample_logits"], split_size)
    if {"ref_pool", "sample_pool"} <= arrays.keys():
        found["precision"], found["recall"] = score.precision_recall(arrays["ref_pool"], arrays["sample_pool"])
    if not found:
        raise ValueError(f"no metric can be computed; expected arrays {', '.join(ARRAYS)}, found {', '.join(arrays) or 'none'}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.fid", description="FID, sFID, Inception score, precision, recall.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("score", help="recorded features to scores")
    command.add_argument("--features", type=Path, required=True, metavar="FILE", help=".npz")
    command.add_argument("--split-size", type=int, default=score.SPLIT_SIZE, help="images a split of the Inception score")
    command.add_argument("--out", type=Path, metavar="FILE", help="also write the scores as JSON")
    options = parser.parse_args(arguments)
    try:
        if options.split_size < 1:
            raise ValueError(f"--split-size is {options.split_size}; expected 1 or more")
        arrays = read_features(options.features)
        try:
            found = measure(arrays, options.split_size)
        except ValueError as error:
            raise ValueError(f"{options.features}: {error}") from None
        for name, value in found.items():
            print(f"{name:<16} {value:.6f}")
        print("precision and recall: exact distances; ADM's float16 ones come out some hundredths higher")
        if options.out is not None:
            record = {"features": str(options.features), "split_size": options.split_size, **found}
            layout.write_text(options.out, json.dumps(record, indent=2) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
