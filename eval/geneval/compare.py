"""Several models on the same prompts: python -m eval.geneval compare [NAME=]FOLDER
[NAME=]FOLDER ...

A folder is an --out of `python -m eval.geneval`. Each model is compared with the first:
the difference of the scores, per skill and overall, in points, with a 95 % interval
from a paired bootstrap over prompts (eval/intervals.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from eval import report_table, tables
from eval.intervals import Interval, paired_bootstrap
from mmtensorar import files
from mmtensorar.cli import Parser, command

Shares = Mapping[str, Mapping[str, float]]  # skill -> prompt -> share of its images that are correct


def read(folder: Path) -> tuple[dict, Shares]:
    """summary.json, and the share of correct images of each prompt (its whole
    metadata).

    Raises ValueError naming the file that is missing or damaged.
    """
    summary = report_table.read_summary(folder / "summary.json")
    num_rows = 0
    verdicts: dict[str, dict[str, list[bool]]] = {}
    for where, row in files.read_json_lines(folder / "results.jsonl"):
        has_text = isinstance(row.get("metadata"), str) and isinstance(row.get("tag"), str)
        if not has_text or type(row.get("correct")) is not bool:
            raise ValueError(f"{where}: expected tag, metadata and correct")
        verdicts.setdefault(row["tag"], {}).setdefault(row["metadata"], []).append(row["correct"])
        num_rows += 1
    if num_rows != summary["num_images"]:
        raise ValueError(
            f"{folder}: results.jsonl has {num_rows} images, and summary.json {summary['num_images']}; "
            "score them again"
        )
    return summary, {
        tag: {prompt: sum(given) / len(given) for prompt, given in prompts.items()}
        for tag, prompts in verdicts.items()
    }


def differences(baseline: Shares, other: Shares, seed: int = 0) -> dict[str, Interval]:
    """Skill, and overall -> other - baseline.

    Raises ValueError when their prompts differ.
    """
    one, two = ({(tag, prompt) for tag in shares for prompt in shares[tag]} for shares in (baseline, other))
    if apart := sorted(one ^ two):
        raise ValueError(
            f"their prompts differ, number in one of them only: {len(apart)}, such as {apart[0][1][:200]}; "
            "only scores on the same prompts can be compared in pairs"
        )
    gains = {
        tag: [other[tag][prompt] - share for prompt, share in prompts.items()]
        for tag, prompts in baseline.items()
    }
    return paired_bootstrap(gains, seed)


def render(baseline: str, by_model: Mapping[str, Mapping[str, Interval]]) -> str:
    """Model -> its differences, as a table."""
    skills = list(next(iter(by_model.values())))
    rows = [[name, *(str(by_skill[skill]) for skill in skills)] for name, by_skill in by_model.items()]
    return "\n".join(tables.text([[f"minus {baseline}", *skills], *rows], num_left=0))


@command
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m eval.geneval compare",
        description="Models on the same prompts: differences with intervals.",
        example="plain=runs/eval/plain runs/eval/tensorar",
    )
    parser.add_argument(
        "folders", nargs="+", metavar="[NAME=]FOLDER", help="the first is what the others are compared with"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the differences as JSON")
    options = parser.parse_args(arguments)
    folders = report_table.by_name(options.folders, "folders")
    if len(folders) < 2:
        raise ValueError("one folder given; expected two or more to compare")
    scored = {name: read(folder) for name, folder in folders.items()}
    print(report_table.render({name: summary for name, (summary, _) in scored.items()}))
    baseline, *names = scored
    by_model = {}
    for name in names:
        try:
            gains = differences(scored[baseline][1], scored[name][1])
            by_model[report_table.marked(name, scored[name][0])] = gains
        except ValueError as error:
            raise ValueError(f"{folders[baseline]} and {folders[name]}: {error}") from None
    print("\nDifferences in points [95 % interval, paired bootstrap over prompts]:")
    print(render(report_table.marked(baseline, scored[baseline][0]), by_model))
    if options.out is not None:
        content = {"baseline": baseline, "differences": by_model}
        files.write_text(options.out, json.dumps(content, indent=2) + "\n")
    return 0
