"""Metrics on features: features.npz and expected.json {"expected": {name: {value,
rel_tol or abs_tol}}}.

A name begins with the metric: fid, sfid, inception_score, precision or recall. Then it
says on what: nothing (reference against samples), _reversed, _ref_with_itself,
_first_A_ref_B_sample, _sample_is_A_ref_then_B_sample or _split_N.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from eval.fid import score
from mmtensorar.files import read_json

NAME = re.compile(
    r"(?P<metric>s?fid|inception_score|precision|recall)"
    r"(?P<reversed>_reversed)?(?P<itself>_ref_with_itself)?"
    r"(?:_first_(?P<ref>\d+)_ref_(?P<sample>\d+)_sample)?"
    r"(?:_sample_is_(?P<copied>\d+)_ref_then_(?P<own>\d+)_sample)?"
    r"(?:_split_(?P<split>\d+))?"
)


def matches(folder: Path) -> bool:
    return (folder / "features.npz").is_file() and (folder / "expected.json").is_file()


def check(folder: Path) -> Iterator[tuple[str, str | None]]:
    """Yields every expected value's name and its difference or None.

    Raises ValueError for a folder that cannot be read.
    """
    with np.load(folder / "features.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    for name, rule in read_json(folder / "expected.json")["expected"].items():
        match = NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{folder / 'expected.json'}: {name} is no metric known here")
        found, expected = measure(arrays, **match.groupdict()), rule["value"]
        limit = max(rule.get("abs_tol", 0), rule.get("rel_tol", 0) * abs(expected))
        yield (
            name,
            None
            if abs(found - expected) <= limit
            else f"{found!r}, expected {expected!r} within {limit:.3g}",
        )


def measure(arrays, metric, reversed, itself, ref, sample, copied, own, split) -> float:
    if metric == "inception_score":
        return score.inception_score(arrays["sample_logits"], *([int(split)] if split else []))
    kind = "spatial" if metric == "sfid" else "pool"
    reference, samples = arrays[f"ref_{kind}"], arrays[f"sample_{kind}"]
    if ref:
        reference, samples = reference[: int(ref)], samples[: int(sample)]
    if copied:
        samples = np.concatenate([reference[: int(copied)], samples[: int(own)]])
    if itself:
        samples = reference
    if reversed:
        reference, samples = samples, reference
    if metric in ("precision", "recall"):
        return score.precision_recall(reference, samples)[metric == "recall"]
    return score.frechet_distance(score.statistics(samples), score.statistics(reference))
