"""Score recorded features: no model, no pictures.

    python -m eval.fid score --features features.npz [--split-size 5000] [--out FILE]

The file holds float arrays: ref_pool [N, C] and sample_pool [M, C] for FID, precision
and recall, ref_spatial and sample_spatial for sFID, sample_logits [M, V] for the
Inception score.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from eval import harness
from eval.fid import score, sources
from mmtensorar import files
from mmtensorar.cli import command
from mmtensorar.folders import LeftOut
from mmtensorar.words import counted

ARRAYS = ("ref_pool", "sample_pool", "ref_spatial", "sample_spatial", "sample_logits")
NEEDS = {  # metric -> its arrays
    "fid": ARRAYS[:2],
    "sfid": ARRAYS[2:4],
    "inception_score": ARRAYS[4:],
    "precision": ARRAYS[:2],
    "recall": ARRAYS[:2],
}


def read_features(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file.

    Raises ValueError naming the file, and an array that is invalid or not finite.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ARRAYS if name in file.files}
            left_out = LeftOut(path)
            for name in sorted(set(file.files) - set(ARRAYS)):
                left_out.add(f"expected {', '.join(ARRAYS)}", Path(name))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except sources.DAMAGE as error:
        raise ValueError(f"{path}: not an .npz of arrays ({error})") from None
    for name, array in arrays.items():
        if array.ndim != 2 or array.dtype.kind != "f":
            raise ValueError(
                f"{path}: {name} is {array.dtype} of shape {list(array.shape)}; expected floats [N, C]"
            )
        least = 1 if name == "sample_logits" else 2  # a covariance needs two
        if len(array) < least:
            found = counted(len(array), "picture")
            raise ValueError(f"{path}: {name} has features of {found}; expected {least} or more")
        if not np.isfinite(array).all():
            raise ValueError(f"{path}: {name} has numbers that are not finite")
    left_out.print()
    return arrays


def measure(
    arrays: Mapping[str, np.ndarray],
    split_size: int = score.SPLIT_SIZE,
    statistics: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
) -> dict[str, float]:
    """The metrics that the arrays allow, by name.

    Args:
        arrays: features, by the names of ARRAYS.
        split_size: images in a split of the Inception score.
        statistics: kind of features -> mean and covariance of the reference, instead of
            those of its array.

    Raises ValueError when the arrays allow no metric.
    """
    metrics = {}
    for name, kind in (("fid", "pool"), ("sfid", "spatial")):
        known = (statistics or {}).get(kind)
        if f"sample_{kind}" in arrays and (known or f"ref_{kind}" in arrays):
            reference = score.Statistics(*known) if known else score.statistics(arrays[f"ref_{kind}"])
            metrics[name] = score.frechet_distance(score.statistics(arrays[f"sample_{kind}"]), reference)
    if "sample_logits" in arrays:
        metrics["inception_score"] = score.inception_score(arrays["sample_logits"], split_size)
    if {"ref_pool", "sample_pool"} <= arrays.keys():
        metrics["precision"], metrics["recall"] = score.precision_recall(
            arrays["ref_pool"], arrays["sample_pool"]
        )
    if not metrics:
        present = ", ".join(arrays) or "none"
        raise ValueError(f"no metric can be computed; expected arrays {', '.join(ARRAYS)}, found {present}")
    return metrics


def show(metrics: Mapping[str, float]) -> None:
    for name, value in metrics.items():
        print(f"{name:<16} {value:.6f}")
    if "precision" in metrics:
        print("precision and recall: exact distances; ADM's float16 ones come out some hundredths higher")


def add_split_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--split-size",
        type=int,
        default=score.SPLIT_SIZE,
        metavar="N",
        help=f"images in a split of the Inception score (default {score.SPLIT_SIZE})",
    )


@command
def main(arguments: list[str] | None = None) -> int:
    parser = harness.make_parser(
        "eval.fid score", "Recorded features to scores.", example="--features features.npz"
    )
    parser.add_argument("--features", type=Path, required=True, metavar="FILE", help=".npz")
    add_split_size(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the scores as JSON")
    options = parser.parse_args(arguments)
    harness.check_numbers(options, split_size=1)
    arrays = read_features(options.features)
    try:
        metrics = measure(arrays, options.split_size)
    except ValueError as error:
        raise ValueError(f"{options.features}: {error}") from None
    show(metrics)
    for name, needed in NEEDS.items():
        if absent := [array for array in needed if array not in arrays]:
            print(f"note: {options.features}: no {' and '.join(absent)}, so no {name}", file=sys.stderr)
    if options.out is not None:
        record = {"features": str(options.features), "split_size": options.split_size, **metrics}
        files.write_text(options.out, json.dumps(record, indent=2) + "\n")
    return 0
