"""Score detections that were recorded before, by GenEval's rules: no model, no images.

    python -m eval.geneval score --detections cases.jsonl[.gz] --out results.jsonl

A line of the file is one image: prompt_index (line of GenEval's prompts, from 0), detections {class: rows [x1, y1, x2,
y2, score]}, colors {class: the colour of each row}, and options with settings that differ from GenEval's. A line may
hold a verdict too (correct, reason, kept); then the command says how many it agrees with.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from eval import report_table
from eval.geneval.prompts import prompts
from eval.geneval.score import COLORS, Settings, Verdict, judge, summarize
from mmtensorar import files

VERDICT = ("correct", "reason", "kept")


def read_cases(path: Path) -> Iterator[tuple[str, dict]]:
    """(place in the file, case), checked. Raises ValueError naming the file and line of one that cannot be scored."""
    for where, case in files.read_json_lines(path):
        if problem := _problem(case):
            raise ValueError(f"{where}: {problem}")
        yield where, case


def _problem(case: Mapping) -> str | None:
    index = case.get("prompt_index")
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(prompts()):
        return f"prompt_index is {index!r}, expected 0 to {len(prompts()) - 1}"
    detections, colors, options = (case.get(key, {}) for key in ("detections", "colors", "options"))
    for key, value in (("detections", detections), ("colors", colors), ("options", options)):
        if not isinstance(value, dict):
            return f"{key} is {value!r}, expected an object"
    for name, rows in detections.items():
        if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
            return f"detections of {name}: expected rows [x1, y1, x2, y2, score] of numbers"
        told = colors.get(name, [])
        if (
            not isinstance(told, list)
            or (told and len(told) != len(rows))
            or not set(map(str, told)) <= {*COLORS, "None"}
        ):
            return f"colors of {name}: expected one of GenEval's colours for each of its {len(rows)} rows, got {told!r}"
    known = asdict(Settings())
    for name, value in options.items():
        if name not in known:
            return f"options: {name!r} is no setting; known are {', '.join(known)}"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return f"options: {name} is {value!r}, expected a number"
    return None


def _is_row(row: object) -> bool:
    return isinstance(row, list) and len(row) == 5 and all(type(number) in (int, float) for number in row)


def score(case: Mapping) -> Verdict:
    """The verdict on one recorded image."""
    metadata = prompts()[case["prompt_index"]]
    colors = {name: told for name, told in case.get("colors", {}).items() if told}
    return judge(metadata, case.get("detections", {}), colors, Settings(**case.get("options", {})))


def disagreements(case: Mapping, verdict: Verdict) -> list[str]:
    """What differs from the verdict that a case holds; of one without a verdict nothing does."""
    found = verdict._asdict()
    return [
        f"{key}: recorded {case[key]!r}, found {found[key]!r}"
        for key in VERDICT
        if key in case and case[key] != found[key]
    ]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.geneval score", description="Score recorded detections by GenEval's rules."
    )
    parser.add_argument(
        "--detections", type=Path, required=True, metavar="FILE", help="cases, .jsonl or .jsonl.gz"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="results.jsonl, one line an image"
    )
    options = parser.parse_args(arguments)
    num_recorded = num_equal = 0
    verdicts = []

    def results() -> Iterator[dict]:
        nonlocal num_recorded, num_equal
        for where, case in read_cases(options.detections):
            verdict, metadata = score(case), prompts()[case["prompt_index"]]
            if "correct" in case:
                num_recorded += 1
                differences = disagreements(case, verdict)
                num_equal += not differences
                if differences:
                    print(f"{where}: {'; '.join(differences)}", file=sys.stderr)
            verdicts.append((metadata, verdict.correct))
            tag, prompt = metadata["tag"], metadata["prompt"]
            yield {"tag": tag, "prompt": prompt, **verdict._asdict(), "metadata": json.dumps(metadata)}

    try:
        files.write_json_lines(options.out, results())
        summary = {"suite": "geneval", "detector": f"recorded in {options.detections}", **summarize(verdicts)}
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report_table.render({options.detections.name: summary}))
    if num_recorded:
        print(f"\n{num_equal} of {num_recorded} recorded verdicts are equal")
    print(f"\n{options.out}")
    return 1 if num_equal < num_recorded else 0
