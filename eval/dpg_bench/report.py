"""DPG-Bench's scores, printed and as JSON: both modes of score.py, with their table and
judge.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from eval import layout
from eval.dpg_bench import score
from eval.layout import Problem
from mmtensorar.folders import shown
from mmtensorar.words import counted

MAX_NAMED = 3  # answers in a note
OFFICIAL_TABLE = "98457fc9901943f51ff9a30367250fc292533bed"  # git blob id


def git_blob_id(path: Path) -> str:
    """What `git hash-object` prints for a file."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def report(
    rows: Sequence[score.Question],
    table: Path,
    source: Path,
    answers: score.Answers,
    judge: str,
    partial: Sequence[Problem] = (),
    unanswered: Sequence[str] = (),
) -> dict:
    """Print the scores of both modes; returns them for a JSON file.

    Args:
        rows: the questions.
        table: the file that they come from.
        source: the folder of pictures, or the file of answers, for notes.
        answers: to the questions.
        judge: who gave the answers.
        partial: a sentence for each thing that is missing.
        unanswered: items with a picture about which nothing could be asked.
    """
    blob = git_blob_id(table)
    is_official = blob == OFFICIAL_TABLE
    which = "the official table" if is_official else f"NOT the official table, which is {OFFICIAL_TABLE}"
    print(f"questions: {table}, git blob {blob}: {which}\njudge: {judge}\n")
    layout.note(source, partial)
    given = count_answers(source, rows, answers)
    try:
        official = score.official(rows, answers, unanswered)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    mark = f" (PARTIAL, {layout.in_words(layout.numbers(partial))})" if partial else ""
    print(_text(f"official{mark}", official))
    try:
        corrected = score.corrected(rows, answers)
        print("\n" + _text("corrected", corrected))
    except ValueError as error:
        corrected = None
        print(f"\ncorrected: cannot be computed, {error}")
    return {
        "benchmark": "dpg_bench",
        "judge": judge,
        "questions": str(table),
        "git_blob": blob,
        "is_official_table": is_official,
        "partial": list(partial) or None,
        "partial_numbers": layout.numbers(partial) or None,
        "answers_given": given,
        "official": _as_dict(official),
        "corrected": corrected and _as_dict(corrected),
    }


def count_answers(source: Path, rows: Sequence[score.Question], answers: score.Answers) -> dict[str, int]:
    """How many answers are yes, no and other, and how many are to a question that the
    table does not have for the item.

    Prints a note about the last two. Items that are not in the table are not counted.
    """
    numbers: Counter[str] = Counter()
    others: dict[str, list[str]] = {}  # text -> where it was given
    unasked: list[str] = []
    for item, questions in score.whole_table(rows).items():
        ids = {question.id for question in questions}
        for number, picture in enumerate(answers.get(item, [])):
            for question, text in picture.items():
                where = f"item {shown(item)} picture {number} question {question}"
                if question not in ids:
                    numbers["unknown_question"] += 1
                    unasked.append(where)
                elif text in ("yes", "no"):
                    numbers[text] += 1
                else:
                    numbers["other"] += 1
                    others.setdefault(text, []).append(where)
    texts = sorted(others.items(), key=lambda pair: -len(pair[1]))
    named = [f"{text[:40]!r} {counted(len(where), 'time')}, first {where[0]}" for text, where in texts]
    rule = "counted as no, as in the official script (neither 'yes' nor 'no')"
    _note(source, numbers["other"], rule, named)
    _note(source, numbers["unknown_question"], "left out, to questions that the table does not have", unasked)
    return dict(numbers)


def _note(source: Path, number: int, what: str, named: Sequence[str]) -> None:
    if number:
        more = f"; and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
        text = f"{counted(number, 'answer')} {what}: {'; '.join(named[:MAX_NAMED])}{more}"
        print(f"note: {source}: {text}", file=sys.stderr)


def _text(mode: str, scores: score.Scores) -> str:
    """Overall and categories of one mode."""
    head = f"{mode}: DPG-Bench score {scores.overall:.4f}, {counted(len(scores.per_prompt), 'prompt')}"
    if scores.failed:
        head += f"; {len(scores.failed)} left out: {', '.join(map(shown, scores.failed))}"
        if scores.unknown:
            head += f" ({len(scores.unknown)} not in the table)"
    if scores.unknown_parents:
        head += f"; {counted(scores.unknown_parents, 'parent')} that the table lacks ignored"
    lines = [
        f"  {name:<28}{category.score:>9.4f}  {num:>6} question{'s' * (num != 1)}"
        for level in (scores.broad, scores.detailed)
        for name, category in level.items()
        for num in [category.num_questions]
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
