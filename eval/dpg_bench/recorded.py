"""Score recorded answers: no model, no pictures, no judge.

    python -m eval.dpg_bench score --answers answers.jsonl[.gz] --questions dpg_bench.csv

A line of the answers is one picture: item_id, image (its number in the item's grid,
from 0) and answers {question id: text}.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from eval import harness
from eval.dpg_bench import score
from eval.dpg_bench.report import report
from eval.layout import Problem
from mmtensorar import files
from mmtensorar.cli import command
from mmtensorar.words import counted

MAX_DIGITS = 18  # of a question's id


def read_answers(path: Path, num_images: int | None = None) -> dict[str, list[dict[int, str]]]:
    """Item -> per picture, in order, {question id: answer}.

    num_images: the first pictures; None: all.

    Raises ValueError naming file and line of an answer that is damaged, duplicated or
    out of order.
    """
    by_item: dict[str, dict[int, dict[int, str]]] = {}
    for where, row in files.read_json_lines(path):
        item, image, answers = row.get("item_id"), row.get("image"), row.get("answers")
        if not isinstance(item, str) or type(image) is not int or image < 0 or not isinstance(answers, dict):
            raise ValueError(
                f"{where}: expected item_id, image (0 or more) and answers, got {str(row)[:100]}"
            )
        if not all(
            key.isdecimal() and len(key) <= MAX_DIGITS and isinstance(text, str)
            for key, text in answers.items()
        ):
            raise ValueError(f"{where}: expected answers as {{question id: text}}")
        if image in (pictures := by_item.setdefault(item, {})):
            raise ValueError(f"{where}: item {item} has picture {image} twice")
        pictures[image] = {int(key): text for key, text in answers.items()}
        if len(pictures[image]) < len(answers):
            raise ValueError(f'{where}: a question has two answers, as in {{"1": ..., "01": ...}}')
    for item, pictures in by_item.items():
        if sorted(pictures) != list(range(len(pictures))):
            numbers = ", ".join(map(str, sorted(pictures)))
            raise ValueError(f"{path}: item {item} has pictures {numbers}; expected them from 0 on")
        if num_images is not None and len(pictures) < num_images:
            raise ValueError(f"{path}: item {item} has {len(pictures)} pictures; expected {num_images}")
    return {
        item: [pictures[number] for number in range(num_images or len(pictures))]
        for item, pictures in by_item.items()
    }


def gaps(rows: Sequence[score.Question], answers: score.Answers) -> list[Problem]:
    """A sentence for each item that only the table or only the answers have, or that
    has fewer pictures than another.
    """
    items = dict.fromkeys(row.item for row in rows)
    most = max(map(len, answers.values()), default=0)
    problems = [
        Problem("missing item", f"item {item} has no answers") for item in items if item not in answers
    ]
    for item, pictures in answers.items():
        if item not in items:
            problems.append(Problem("unknown item", f"item {item} is not in the table"))
        if len(pictures) < most:
            sentence = f"item {item} has {len(pictures)} of {counted(most, 'picture')}"
            problems.append(Problem("missing image", sentence, most - len(pictures)))
    return problems


@command
def main(arguments: list[str] | None = None) -> int:
    parser = harness.make_parser(
        "eval.dpg_bench score",
        "Recorded answers to scores.",
        example="--answers answers.jsonl --questions dpg_bench/dpg_bench.csv --num-images 4",
    )
    parser.add_argument("--answers", type=Path, required=True, metavar="FILE", help=".jsonl or .jsonl.gz")
    parser.add_argument(
        "--questions", type=Path, required=True, metavar="FILE", help="the table, dpg_bench.csv"
    )
    parser.add_argument(
        "--num-images", type=int, metavar="N", help="first pictures of each item to count (default: all)"
    )
    parser.add_argument("--judge", default="unknown", help="who gave the answers; printed next to the scores")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write everything as JSON")
    options = parser.parse_args(arguments)
    harness.check_numbers(options, num_images=1)
    rows = score.read_rows(options.questions)
    answers = read_answers(options.answers, options.num_images)
    partial = gaps(rows, answers)
    # Pictures of prompts that the table lacks: nothing was asked about them.
    unasked = [item for item in answers.keys() - {row.item for row in rows} if not any(answers[item])]
    asked = {item: pictures for item, pictures in answers.items() if item not in unasked}
    scores = report(rows, options.questions, options.answers, asked, options.judge, partial, unasked)
    if options.out is not None:
        files.write_text(options.out, json.dumps(scores, indent=2) + "\n")
        print(f"\n{options.out}")
    return 0
