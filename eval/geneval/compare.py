"""Several models on the same prompts: python -m eval.geneval compare [NAME=]FOLDER [NAME=]FOLDER ...

A folder is an --out of `python -m eval.geneval`. Each is set beside the first: the difference of the scores, per skill
and overall, in points, with a 95 % interval from a paired bootstrap. Prompts are drawn anew within each skill, the same ones
for both models, so that what a prompt's difficulty adds to both scores cancels.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from eval import report_table
from mmtensorar import files

NUM_RESAMPLES = 10_000


def read(folder: Path) -> tuple[dict, dict[str, dict[str, float]]]:
    """summary.json, and skill -> prompt (its whole metadata) -> share of its images that are correct.

    Raises ValueError naming the file that is missing or damaged.
    """
    summary = report_table.read_summary(folder / "summary.json")
    verdicts: dict[str, dict[str, list[bool]]] = {}
    for where, row in files.read_json_lines(folder / "results.jsonl"):
        if (
            not isinstance(row.get("metadata"), str)
            or not isinstance(row.get("tag"), str)
            or type(row.get("correct")) is not bool
        ):
            raise ValueError(f"{where}: expected tag, metadata and correct")
        verdicts.setdefault(row["tag"], {}).setdefault(row["metadata"], []).append(row["correct"])
    return summary, {
        tag: {prompt: sum(given) / len(given) for prompt, given in prompts.items()}
        for tag, prompts in verdicts.items()
    }


def differences(
    one: Mapping[str, Mapping[str, float]], other: Mapping[str, Mapping[str, float]], seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """Skill, and overall -> (other - one, low, high), shares of 1. Raises ValueError when their prompts differ."""
    if {tag: prompts.keys() for tag, prompts in one.items()} != {
        tag: prompts.keys() for tag, prompts in other.items()
    }:
        raise ValueError("they have other prompts; only scores on the same prompts can be compared in pairs")
    rng = np.random.default_rng(seed)
    found, means, resampled = {}, [], []
    for tag, prompts in one.items():
        gains = np.array([other[tag][prompt] - share for prompt, share in prompts.items()])
        drawn = gains[rng.integers(len(gains), size=(NUM_RESAMPLES, len(gains)))].mean(axis=1)
        found[tag] = (float(gains.mean()), *map(float, np.percentile(drawn, (2.5, 97.5))))
        means.append(gains.mean())
        resampled.append(drawn)
    overall = np.mean(resampled, axis=0)
    found["overall"] = (float(np.mean(means)), *map(float, np.percentile(overall, (2.5, 97.5))))
    return found


def render(baseline: str, found: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> str:
    """Model -> its differences, as a table."""
    skills = list(next(iter(found.values())))
    table = [[f"minus {baseline}", *skills]]
    for name, row in found.items():
        table.append(
            [
                name,
                *(
                    f"{100 * d:+.1f} [{100 * low:+.1f} {100 * high:+.1f}]"
                    for d, low, high in map(row.get, skills)
                ),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table
    )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.geneval compare", description="Models on the same prompts."
    )
    parser.add_argument(
        "folders", nargs="+", metavar="[NAME=]FOLDER", help="the first is what the others are compared with"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the differences as JSON")
    options = parser.parse_args(arguments)
    try:
        folders: dict[str, Path] = {}
        for name, folder in map(report_table.named, options.folders):
            if name in folders:
                raise ValueError(f"two folders are named {name!r}; name them apart with NAME=FOLDER")
            folders[name] = folder
        if len(folders) < 2:
            raise ValueError("one folder given; expected two or more to compare")
        both = {name: read(folder) for name, folder in folders.items()}
        print(report_table.render({name: summary for name, (summary, _) in both.items()}))
        baseline, *others = both
        found = {}
        for name in others:
            try:
                found[name] = differences(both[baseline][1], both[name][1])
            except ValueError as error:
                raise ValueError(f"{folders[baseline]} and {folders[name]}: {error}") from None
        print(
            f"\nDifferences in points [95 % interval, paired bootstrap over prompts]:\n{render(baseline, found)}"
        )
        if options.out is not None:
            files.write_text(
                options.out, json.dumps({"baseline": baseline, "differences": found}, indent=2) + "\n"
            )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
