"""Score recorded detections by GenEval's rules: no model, no images.

    python -m eval.geneval score --detections cases.jsonl[.gz] --out results.jsonl

A line of the file is one image:

    prompt_index            line of GenEval's prompts, from 0
    detections              {class: rows [x1, y1, x2, y2, score]}
    colors                  {class: the colour of each row}
    options                 settings that differ from GenEval's
    correct, reason, kept   optional: a verdict; the command prints how many it agrees with
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from eval import harness, layout, report_table
from eval.geneval.prompts import CLASSES, prompts
from eval.geneval.score import COLORS, Settings, Verdict, judge, summarize
from eval.layout import Problem
from mmtensorar import files
from mmtensorar.cli import Parser, command

LARGEST = 3.4e38  # what float32 holds
_KIND = {int: "whole number", float: "number"}
VERDICT = ("correct", "reason", "kept")


def read_cases(path: Path) -> Iterator[tuple[str, dict]]:
    """("FILE line N", case).

    Raises ValueError naming file and line of a case that cannot be scored.
    """
    for where, case in files.read_json_lines(path):
        if problem := _problem(case):
            raise ValueError(f"{where}: {problem}")
        yield where, case


def _problem(case: Mapping) -> str | None:
    index = case.get("prompt_index")
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(prompts()):
        return f"prompt_index is {_shown(index)}, expected 0 to {len(prompts()) - 1}"
    detections = case.get("detections")  # required: under a misspelt name it would be an empty picture
    colors, options = (case.get(key, {}) for key in ("colors", "options"))
    for key, value in (("detections", detections), ("colors", colors), ("options", options)):
        if not isinstance(value, dict):
            return f"{key} is {_shown(value)}, expected an object"
    for name, rows in detections.items():
        if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
            return f"detections of {name}: expected rows [x1, y1, x2, y2, score] of numbers"
        given = colors.get(name, [])
        if (
            not isinstance(given, list)
            or (given and len(given) != len(rows))
            or not set(map(str, given)) <= {*COLORS, "None"}
        ):
            return (
                f"colors of {name}: expected one of GenEval's colours for each of its {len(rows)} rows, "
                f"got {_shown(given)}"
            )
    for name in (clause["class"] for clause in prompts()[index]["include"] if "color" in clause):
        if detections.get(name) and not colors.get(name):
            return f"colors of {name}: prompt {index} asks for a colour; expected that of each row"
    known = asdict(Settings())
    for name, value in options.items():
        if name not in known:
            return f"options: {name!r} is not a setting; known are {', '.join(known)}"
        if not _is_number(value) or (type(known[name]) is int and type(value) is not int):
            return f"options: {name} is {_shown(value)}, expected a {_KIND[type(known[name])]}"
    return None


def _is_row(row: object) -> bool:
    return isinstance(row, list) and len(row) == 5 and all(map(_is_number, row))


def _is_number(value: object) -> bool:
    """Whether a value is a number that fits into 32 bits; NaN does not."""
    return type(value) in (int, float) and abs(value) <= LARGEST  # type: ignore[operator]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def score(case: Mapping) -> Verdict:
    """The verdict on one recorded image."""
    metadata = prompts()[case["prompt_index"]]
    colors = {name: given for name, given in case.get("colors", {}).items() if given}
    return judge(metadata, case["detections"], colors, Settings(**case.get("options", {})))


def disagreements(case: Mapping, verdict: Verdict) -> list[str]:
    """A sentence for each entry that differs from the verdict that a case holds, if it
    holds one.
    """
    ours = verdict._asdict()
    return [
        f"{key}: recorded {case[key]!r}, found {ours[key]!r}"
        for key in VERDICT
        if key in case and case[key] != ours[key]
    ]


def gaps(cases: Mapping[int, int], num_images: int | None = None) -> list[Problem]:
    """A sentence for each prompt that does not have as many images as it must; none for
    a whole set.

    Args:
        cases: place of a prompt among GenEval's -> number of its images.
        num_images: how many images of each prompt there must be; None: the most that
            one has.
    """
    expected = num_images or max(cases.values(), default=1)
    problems = []
    for index in range(len(prompts())):
        num = cases.get(index, 0)
        if num == 0:
            problems.append(Problem("missing prompt", f"prompt {index} has no image"))
        elif num != expected:
            # Surplus ones are scored: nothing says which of them are meant.
            kind = "missing image" if num < expected else "surplus image"
            problems.append(Problem(kind, f"prompt {index}: {num} of {expected} images", abs(num - expected)))
    return problems


def _note(path: Path, what: str, numbers: Counter[str]) -> None:
    """Print a note with the numbers by name, the largest first, if there are any."""
    named = [f"{number} {name[:40]!r}" for name, number in numbers.most_common()]
    if named:
        more = f" and {len(named) - 10} more" if len(named) > 10 else ""
        print(f"note: {path}: {what}: {', '.join(named[:10])}{more}", file=sys.stderr)


@command
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m eval.geneval score",
        description="Score recorded detections by GenEval's rules.",
        example="--detections cases.jsonl.gz --out results.jsonl",
    )
    parser.add_argument(
        "--detections", type=Path, required=True, metavar="FILE", help="cases, .jsonl or .jsonl.gz"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="results.jsonl, one line an image"
    )
    parser.add_argument(
        "--num-images",
        type=int,
        metavar="N",
        help="images of a whole set's prompts (default: the most)",
    )
    options = parser.parse_args(arguments)
    harness.check_numbers(options, num_images=1)
    num_recorded = num_equal = 0
    verdicts = []
    unknown: Counter[str] = Counter()  # class -> rows
    settings: Counter[str] = Counter()  # setting -> images
    default = asdict(Settings())
    cases: Counter[int] = Counter()

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
            cases[case["prompt_index"]] += 1
            for name, rows in case["detections"].items():
                unknown[name] += len(rows) if name not in CLASSES else 0
            settings.update(name for name, value in case.get("options", {}).items() if value != default[name])
            tag, prompt = metadata["tag"], metadata["prompt"]
            yield {"tag": tag, "prompt": prompt, **verdict._asdict(), "metadata": json.dumps(metadata)}

    files.write_json_lines(options.out, results())
    problems = gaps(cases, options.num_images)
    layout.note(options.detections, problems)
    _note(options.detections, "left out, rows of classes that GenEval does not have", +unknown)
    _note(options.detections, "images scored with other settings than GenEval's", settings)
    summary = {
        "suite": "geneval",
        "detector": f"recorded in {options.detections}",
        "partial": problems,
        "partial_numbers": layout.numbers(problems),
        **summarize(verdicts),
    }
    print(report_table.render({options.detections.name: summary}))
    if num_recorded:
        print(f"\n{num_equal} of {num_recorded} recorded verdicts are equal")
    print(f"\n{options.out}")
    return 1 if num_equal < num_recorded else 0
