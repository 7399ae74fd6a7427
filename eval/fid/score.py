"""FID, sFID, Inception score, precision and recall from features.

Pure: arrays in, numbers out.

The definitions are those of ADM's evaluator (github.com/openai/guided-diffusion,
evaluations/evaluator.py), which LlamaGen copied, with one exception: ADM computes the
distances for precision and recall in float16 where they are finite, as they are for
Inception features. Its published values are therefore some hundredths higher than the
exact ones here, and depend on the device. Shapes: N images, C width of a feature, V
classes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import linalg

EPS = 1e-6  # added to the diagonals where the matrix root is not finite
SPLIT_SIZE = 5000
NEIGHBOURS = 3
BLOCK = 512  # rows of a block of distances


class Statistics(NamedTuple):
    mean: np.ndarray  # [C]
    covariance: np.ndarray  # [C, C] float64


def statistics(features: np.ndarray) -> Statistics:
    """[N, C] -> mean in the features' dtype, covariance over N - 1.

    Raises ValueError below two images.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features have shape {list(features.shape)}; expected [N, C] of two or more images")
    return Statistics(features.mean(axis=0), np.cov(features, rowvar=False).reshape(2 * features.shape[1:]))


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """|difference of means|^2 + tr(A + B - 2 sqrt(A B)).

    Raises ValueError when the widths differ or the root is complex.
    """
    if one.mean.shape != other.mean.shape:
        raise ValueError(
            f"features are {one.mean.shape[0]} and {other.mean.shape[0]} wide; expected one width"
        )
    difference = one.mean - other.mean
    root = linalg.sqrtm(one.covariance @ other.covariance)
    if not np.isfinite(root).all():
        offset = EPS * np.eye(len(one.covariance))
        root = linalg.sqrtm((one.covariance + offset) @ (other.covariance + offset))
    if np.iscomplexobj(root):
        if not np.allclose(np.diagonal(root).imag, 0, atol=1e-3):
            raise ValueError(f"the root of the covariances is complex, by {np.abs(root.imag).max():.3g}")
        root = root.real
    traces = np.trace(one.covariance) + np.trace(other.covariance) - 2 * np.trace(root)
    return float(difference @ difference + traces)


def inception_score(logits: np.ndarray, split_size: int = SPLIT_SIZE) -> float:
    """exp of the mean KL divergence to the split's mean, averaged over splits in the
    given order.

    logits: [N, V] float32. A short last split weighs as much as a full one.
    """
    logits = logits.astype(np.float32)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    scores = []
    for start in range(0, len(shares), split_size):
        split = shares[start : start + split_size]
        # A class of share 0 adds nothing to the divergence.
        logs = np.log(split, where=split > 0, out=np.zeros_like(split)) - np.log(
            split.mean(axis=0, keepdims=True).clip(1e-38)
        )
        scores.append(np.exp((split * logs).sum(axis=1).mean()))
    return float(np.mean(scores))


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Share of samples inside the reference's manifold, and of references inside the
    samples' manifold.

    reference: [N, C]; samples: [M, C]. A manifold is the union of balls around its
    points, each reaching to the point's k-th neighbour (Kynkäänniemi et al. 2019).
    Exact, in float64; only a block of rows of distances is in memory. Raises ValueError
    when there are too few points.
    """
    for name, points in (("reference", reference), ("samples", samples)):
        if len(points) <= neighbours:
            raise ValueError(
                f"precision and recall need more than {neighbours} images, the {name} have {len(points)}"
            )
    precision = _inside(samples, reference, _radii(reference, neighbours)).mean()
    recall = _inside(reference, samples, _radii(samples, neighbours)).mean()
    return float(precision), float(recall)


def _distances(rows: np.ndarray, points: np.ndarray):
    """Squared distances from blocks of rows to all points: (slice, [block, N])."""
    points = points.astype(np.float64)
    squares = np.square(points).sum(axis=1)
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK].astype(np.float64)
        yield (
            slice(start, start + len(block)),
            np.square(block).sum(axis=1)[:, None] + squares - 2 * block @ points.T,
        )


def _radii(points: np.ndarray, neighbours: int) -> np.ndarray:
    radii = np.empty(len(points))
    for block, distances in _distances(points, points):
        # The nearest is the point itself.
        radii[block] = np.partition(distances, neighbours, axis=1)[:, neighbours]
    return radii


def _inside(rows: np.ndarray, points: np.ndarray, radii: np.ndarray) -> np.ndarray:
    inside = np.empty(len(rows), bool)
    for block, distances in _distances(rows, points):
        inside[block] = (distances <= radii).any(axis=1)
    return inside
