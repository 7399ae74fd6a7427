"""Score recorded answers on DPG-Bench.

    python -m eval.dpg_bench score --answers answers.jsonl[.gz] --questions dpg_bench.csv [--num-images N] [--out FILE]

The table of questions is dpg_bench/dpg_bench.csv of github.com/TencentQQGYLab/ELLA; bring it along. A line of the
answers is one picture: item_id, image (its number in the item's grid, from 0) and answers {question id: text}. Both
modes of score.py are printed, the official one first. Asking a judge is not built yet: answers come from elsewhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from eval import layout, lines
from eval.dpg_bench import score

OFFICIAL_TABLE = "98457fc9901943f51ff9a30367250fc292533bed"  # git blob id


def git_blob_id(path: Path) -> str:
    """What `git hash-object` prints for a file."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def read_answers(path: Path, num_images: int | None = None) -> dict[str, list[dict[int, str]]]:
    """item -> per picture {question id: answer}, pictures in their order; num_images: the first so many, None is all.

    Raises ValueError naming file and line of an answer that is damaged, twice there or out of order.
    """
    found: dict[str, dict[int, dict[int, str]]] = {}
    for where, row in lines.read(path):
        item, image, answers = row.get("item_id"), row.get("image"), row.get("answers")
        if not isinstance(item, str) or type(image) is not int or image < 0 or not isinstance(answers, dict):
            raise ValueError(f"{where}: expected item_id, image (0 or more) and answers, got {str(row)[:100]}")
        if not all(key.isdecimal() and isinstance(text, str) for key, text in answers.items()):
            raise ValueError(f"{where}: expected answers as {{question id: text}}")
        if image in (pictures := found.setdefault(item, {})):
            raise ValueError(f"{where}: item {item} has picture {image} twice")
        pictures[image] = {int(key): text for key, text in answers.items()}
    for item, pictures in found.items():
        if sorted(pictures) != list(range(len(pictures))):
            raise ValueError(f"{path}: item {item} has pictures {', '.join(map(str, sorted(pictures)))}; expected them from 0 on")
        if num_images is not None and len(pictures) < num_images:
            raise ValueError(f"{path}: item {item} has {len(pictures)} pictures; expected {num_images}")
    return {item: [pictures[n] for n in range(num_images or len(pictures))] for item, pictures in found.items()}


def as_dict(scores: score.Scores) -> dict:
    """Scores for a JSON file."""

    def categories(found: dict[str, score.Category]) -> dict:
        return {name: {"score": category.score, "num_questions": category.num_questions} for name, category in found.items()}

    prompts = {item: {"scores": each, "average": sum(each) / len(each)} for item, each in scores.per_prompt.items()}
    parts = {"broad": categories(scores.broad), "detailed": categories(scores.detailed), "per_prompt": prompts}
    return {"dpg_score": scores.overall, **parts, "failed": scores.failed, "unknown_parents": scores.unknown_parents}


def render(name: str, scores: score.Scores) -> str:
    """Overall and categories of one mode, as text."""
    left_out = f"; left out: {', '.join(scores.failed)}" if scores.failed else ""
    passed = f"; {scores.unknown_parents} parents that the table lacks passed over" if scores.unknown_parents else ""
    text = [f"{name}: DPG-Bench score {scores.overall:.4f}, {len(scores.per_prompt)} prompts{left_out}{passed}"]
    for level in (scores.broad, scores.detailed):
        text += [f"  {category:<28}{found.score:>9.4f}  {found.num_questions:>6} questions" for category, found in level.items()]
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.dpg_bench", description="DPG-Bench.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("score", help="recorded answers to scores")
    command.add_argument("--answers", type=Path, required=True, metavar="FILE", help=".jsonl or .jsonl.gz")
    command.add_argument("--questions", type=Path, required=True, metavar="FILE", help="the table, dpg_bench.csv")
    command.add_argument("--num-images", type=int, metavar="N", help="first pictures of each item to count (default: all)")
    command.add_argument("--judge", default="not told", help="who gave the answers; stands beside the score")
    command.add_argument("--out", type=Path, metavar="FILE", help="also write everything as JSON")
    options = parser.parse_args(arguments)
    try:
        if options.num_images is not None and options.num_images < 1:
            raise ValueError(f"--num-images is {options.num_images}; expected 1 or more")
        rows = score.read_rows(options.questions)
        blob = git_blob_id(options.questions)
        answers = read_answers(options.answers, options.num_images)
        which = "the official table" if blob == OFFICIAL_TABLE else f"NOT the official table, which is {OFFICIAL_TABLE}"
        print(f"questions: {options.questions}, git blob {blob}: {which}\njudge: {options.judge}\n")
        official = score.official(rows, answers)
        print(render("official", official))
        try:
            corrected = score.corrected(rows, answers)
            print("\n" + render("corrected", corrected))
        except ValueError as error:
            corrected = None
            print(f"\ncorrected: there is no such score, {error}")
        if options.out is not None:
            modes = {"official": as_dict(official), "corrected": corrected and as_dict(corrected)}
            record = {"questions": str(options.questions), "git_blob": blob, "judge": options.judge, **modes}
            layout.write_text(options.out, json.dumps(record, indent=2) + "\n")
            print(f"\n{options.out}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
