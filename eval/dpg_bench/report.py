"""DPG-Bench's scores, printed and as JSON: both modes of score.py, with their table and
judge.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from eval.dpg_bench import score
from mmtensorar.words import counted

OFFICIAL_TABLE = "98457fc9901943f51ff9a30367250fc292533bed"  # git blob id


def git_blob_id(path: Path) -> str:
    """What `git hash-object` prints for a file."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def report(
    rows: Sequence[score.Question],
    table: Path,
    answers: score.Answers,
    judge: str,
    partial: Sequence[str] = (),
    unanswered: Sequence[str] = (),
) -> dict:
    """Print the scores of both modes; returns them for a JSON file.

    Args:
        rows: the questions.
        table: the file that they come from.
        answers: to the questions.
        judge: who gave the answers.
        partial: a sentence for each thing that is missing.
        unanswered: items with a picture about which nothing could be asked.
    """
    blob = git_blob_id(table)
    is_official = blob == OFFICIAL_TABLE
    which = "the official table" if is_official else f"NOT the official table, which is {OFFICIAL_TABLE}"
    print(f"questions: {table}, git blob {blob}: {which}\njudge: {judge}\n")
    official = score.official(rows, answers, unanswered)
    print(_text(f"official{_mark(partial)}", official))
    try:
        corrected = score.corrected(rows, answers)
        print("\n" + _text("corrected", corrected))
    except ValueError as error:
        corrected = None
        print(f"\ncorrected: cannot be computed, {error}")
    given = Counter(
        text if text in ("yes", "no") else "other"
        for pictures in answers.values()
        for picture in pictures
        for text in picture.values()
    )
    return {
        "benchmark": "dpg_bench",
        "judge": judge,
        "questions": str(table),
        "git_blob": blob,
        "is_official_table": is_official,
        "partial": list(partial) or None,
        "answers_given": dict(given),
        "official": _as_dict(official),
        "corrected": corrected and _as_dict(corrected),
    }


def _mark(partial: Sequence[str]) -> str:
    if not partial:
        return ""
    more = f"; and {len(partial) - 3} more" if len(partial) > 3 else ""
    return f" (PARTIAL, {'; '.join(partial[:3])}{more})"


def _text(mode: str, scores: score.Scores) -> str:
    """Overall and categories of one mode."""
    head = f"{mode}: DPG-Bench score {scores.overall:.4f}, {counted(len(scores.per_prompt), 'prompt')}"
    if scores.failed:
        head += f"; left out: {', '.join(scores.failed)}"
        if scores.unknown:
            head += f" ({len(scores.unknown)} not in the table)"
    if scores.unknown_parents:
        head += f"; {scores.unknown_parents} parents that the table lacks were ignored"
    lines = [
        f"  {name:<28}{category.score:>9.4f}  {category.num_questions:>6} questions"
        for level in (scores.broad, scores.detailed)
        for name, category in level.items()
    ]
    return "\n".join([head, *lines])


def _as_dict(scores: score.Scores) -> dict:
    """Scores for a JSON file."""

    def categories(level: dict[str, score.Category]) -> dict:
        return {name: category._asdict() for name, category in level.items()}

    return {
        "dpg_score": scores.overall,
        "broad": categories(scores.broad),
        "detailed": categories(scores.detailed),
        "per_prompt": {
            item: {"scores": of_item, "average": sum(of_item) / len(of_item)}
            for item, of_item in scores.per_prompt.items()
        },
        "failed": scores.failed,
        "unknown": scores.unknown,
        "unknown_parents": scores.unknown_parents,
    }
