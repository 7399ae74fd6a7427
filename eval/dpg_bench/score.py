"""DPG-Bench's scores from a table of questions and a judge's answers.

Pure: text in, numbers out.

official    what the script of TencentQQGYLab/ELLA (dpg_bench/compute_dpg_bench.py) computes, quirks
            included. It skips the first question of the table; a later block of rows replaces an
            earlier one of the same item; it drops a prompt when it reaches a parent question that
            is missing, and a picture of a prompt that is not in the table or that cannot be read,
            and counts them as failed; it does not notice missing pictures; it takes category scores
            from the last picture only, before the dependency rule.
corrected   all rows, all pictures. A question counts only if all its ancestors are answered yes,
            wherever they are in the table. Categories are over all pictures, after that rule. A
            missing picture or answer is an error. A parent that the table lacks is ignored, and
            counted.

A picture is one cell of an item's grid, in order. An answer is right only if it is
exactly "yes".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from data_tools.delimited import quoted_rows
from mmtensorar.files import Line, iterate_lines

COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
YES = "yes"


class Question(NamedTuple):
    """One row of the table.

    parents: ids of questions of the same item; 0 means that there is none.
    """

    item: str
    id: int
    parents: tuple[int, ...]
    category: str  # as in "entity - whole"
    text: str


Table = dict[str, dict[int, Question]]  # item -> question id -> question, in the order of the file
Answers = Mapping[str, Sequence[Mapping[int, str]]]  # item -> per picture the answer to each question


class Category(NamedTuple):
    score: float  # percent
    num_questions: int


class Scores(NamedTuple):
    """Scores of one mode.

    overall: percent, the mean over prompts. per_prompt: item -> the score of each
    picture, 0 to 1.
    """

    overall: float
    broad: dict[str, Category]
    detailed: dict[str, Category]
    per_prompt: dict[str, list[float]]
    failed: list[str]  # official mode: items left out, for any reason, sorted
    unknown: list[str]  # those of them that are not in the table, sorted
    unknown_parents: int = 0  # corrected mode: parents that the table lacks


# ---- the table -----------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Question]:
    """All rows of a question table.

    Raises ValueError naming file and line of a damaged row.
    """
    try:
        with path.open("rb") as file:
            rows = list(_questions(iterate_lines(file), path))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    if not rows:
        raise ValueError(f"{path}: no questions in it")
    return rows


def _questions(lines: Iterator[Line], path: Path) -> Iterator[Question]:
    header: list[str] = []

    def is_row(cells: list[str]) -> bool:
        # Also of a row with a wrong number of cells: it is named, and not swallowed.
        if not set(COLUMNS) <= set(header):
            return False
        item, number = header.index("item_id"), header.index("proposition_id")
        return len(cells) > max(item, number) and bool(cells[item]) and cells[number].strip().isdecimal()

    # Not strict: the official script's pandas takes text after a closing quote.
    for line, cells, problem in quoted_rows(lines, ",", is_row, strict=False):
        where = f"{path} line {line}"
        if problem is not None:
            raise ValueError(f"{where}: {problem}")
        if header:
            if len(cells) > len(header):  # pandas refuses these too
                raise ValueError(f"{where}: {len(cells)} cells, but the header has {len(header)}")
            yield _question(dict(zip(header, cells, strict=False)), where)
            continue
        header = cells
        if missing := [name for name in COLUMNS if name not in header]:
            raise ValueError(f"{path}: no column {', '.join(missing)}; expected a table as dpg_bench.csv")


def _question(row: Mapping[str, str], where: str) -> Question:
    if absent := [name for name in COLUMNS if name not in row]:
        raise ValueError(f"{where}: the row ends before {', '.join(absent)}")
    try:
        number = int(row["proposition_id"])
        parents = tuple(int(part) for part in row["dependency"].split(","))
    except ValueError:
        ids = f"proposition_id {row['proposition_id']!r}, dependency {row['dependency']!r}"
        raise ValueError(f"{where}: {ids}; expected a number, and numbers with commas between") from None
    category = row["tuple"].split("(")[0].strip()
    return Question(row["item_id"], number, parents, category, row["question_natural_language"])


def official_table(rows: Sequence[Question]) -> Table:
    """The table as the official script reads it: no first row, and the last block of
    rows of each item.
    """
    table: Table = {}
    item = None
    for question in rows[1:]:
        if question.item != item:
            item = question.item
            table[item] = {}
        table[item][question.id] = question  # a repeated id: the last row counts, in the first one's position
    return table


def whole_table(rows: Iterable[Question]) -> dict[str, list[Question]]:
    """All rows of each item, wherever they are; two rows of one id are two questions
    with one answer.
    """
    table: dict[str, list[Question]] = {}
    for question in rows:
        table.setdefault(question.item, []).append(question)
    return table


# ---- scores --------------------------------------------------------------------------------------


class _MissingParent(Exception):
    pass


def official(rows: Sequence[Question], answers: Answers, unanswered: Iterable[str] = ()) -> Scores:
    """The official numbers; see the top.

    Args:
        rows: the questions.
        answers: to the questions. An item that the table does not have fails, whatever
            its answers.
        unanswered: further items with a picture, about which nothing could be asked:
            they fail too.

    Raises ValueError for a missing answer, or when no item could be scored.
    """
    table = official_table(rows)
    per_prompt: dict[str, list[float]] = {}
    failed = set(unanswered) - answers.keys()
    pooled: dict[str, list[bool]] = defaultdict(list)
    for item, pictures in answers.items():
        if item not in table or not pictures:
            failed.add(item)
            continue
        questions = table[item]
        given = [
            _given(questions, picture, f"item {item}, picture {number}")
            for number, picture in enumerate(pictures)
        ]
        try:
            per_prompt[item] = [_cascaded(questions, right) for right in given]
        except _MissingParent:
            failed.add(item)
            continue
        for number, question in questions.items():
            pooled[question.category].append(given[-1][number])
    unknown = failed - {question.item for question in rows}
    return _scores(per_prompt, pooled, failed=sorted(failed), unknown=sorted(unknown))


def _cascaded(questions: Mapping[int, Question], right: Mapping[int, bool]) -> float:
    """The score of one picture: a question counts if its parents do.

    The rule goes down the table once, so a parent further down still counts when its
    child is reached.
    """
    counts = dict(right)
    for number, question in questions.items():
        for parent in question.parents:
            if parent == 0:
                continue
            if parent not in counts:
                raise _MissingParent
            if not counts[parent]:
                counts[number] = False
                break
    return sum(counts.values()) / len(counts)


def corrected(rows: Sequence[Question], answers: Answers) -> Scores:
    """See the top.

    Raises ValueError naming items without pictures or answers, and items not in the
    table.
    """
    table = whole_table(rows)
    if absent := [item for item in table if not answers.get(item)]:
        raise ValueError(f"{_count(absent, 'item')} of the table without pictures: {_some(absent)}")
    if strange := [item for item in answers if item not in table]:
        raise ValueError(f"{_count(strange, 'item')} that the table does not have: {_some(strange)}")
    most = max(len(pictures) for pictures in answers.values())
    if fewer := [item for item, pictures in answers.items() if len(pictures) < most]:
        raise ValueError(
            f"{_count(fewer, 'item')} with fewer pictures than the {most} of others: {_some(fewer)}"
        )
    per_prompt: dict[str, list[float]] = {}
    pooled: dict[str, list[bool]] = defaultdict(list)
    unknown = 0
    for item, questions in table.items():
        ids = {question.id for question in questions}
        unknown += sum(parent not in ids for question in questions for parent in question.parents if parent)
        per_prompt[item] = []
        for number, picture in enumerate(answers[item]):
            counts = _with_ancestors(questions, _given(ids, picture, f"item {item}, picture {number}"))
            right = [counts[question.id] for question in questions]
            per_prompt[item].append(sum(right) / len(right))
            for question, counted in zip(questions, right, strict=True):
                pooled[question.category].append(counted)
    return _scores(per_prompt, pooled, unknown_parents=unknown)


def _with_ancestors(questions: Sequence[Question], right: Mapping[int, bool]) -> dict[int, bool]:
    counts = dict(right)
    changed = True
    while changed:  # ends: each round takes at least one question off, also when questions name each other
        changed = False
        for question in questions:
            if counts[question.id] and not all(
                counts.get(parent, True) for parent in question.parents if parent
            ):
                counts[question.id], changed = False, True
    return counts


def _given(questions: Iterable[int], picture: Mapping[int, str], where: str) -> dict[int, bool]:
    if missing := sorted(number for number in questions if number not in picture):
        raise ValueError(f"{where}: no answer to question {', '.join(map(str, missing[:10]))}")
    return {number: picture[number] == YES for number in questions}


def _scores(per_prompt: dict[str, list[float]], pooled: Mapping[str, list[bool]], **more) -> Scores:
    if not per_prompt:
        raise ValueError("no item could be scored")
    means = [sum(scores) / len(scores) for scores in per_prompt.values()]
    broad: dict[str, list[bool]] = defaultdict(list)
    for category, right in pooled.items():
        broad[category.split("-")[0].strip()] += right

    def percents(by_category: Mapping[str, list[bool]]) -> dict[str, Category]:
        return {
            name: Category(100 * sum(right) / len(right), len(right))
            for name, right in sorted(by_category.items())
        }

    return Scores(
        100 * sum(means) / len(means),
        percents(broad),
        percents(pooled),
        per_prompt,
        **{"failed": [], "unknown": []} | more,
    )


def _count(items: Sequence[str], what: str) -> str:
    return f"{len(items)} {what}{'s' * (len(items) > 1)}"


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:10]) + (", ..." if len(items) > 10 else "")
