"""Folders of evaluator fixtures: official verdicts and scores, compared with ours on
the same input.

The files of a folder show its kind. Every reader yields (name, difference or None) for
every value that it compares.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from eval.dpg_bench import score as dpg_score
from eval.dpg_bench.recorded import read_answers
from eval.geneval import recorded
from eval.geneval.prompts import prompts
from eval.geneval.score import summarize
from mmtensorar import files
from mmtensorar.files import read_json
from tests.parity import class_conditional

Differences = Iterator[tuple[str, str | None]]
TOLERANCE = 1e-9


def reader(folder: Path):
    """The function that compares a folder's values; None for a folder of another
    kind.
    """
    if class_conditional.matches(folder):
        return class_conditional.check
    for start, check in (("scoring_cases.jsonl", geneval), ("scoring_answers.jsonl", dpg)):
        if list(folder.glob(f"{start}*")):
            return check
    return None


def _one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise ValueError(f"{folder}: expected one {pattern}, found {len(found)}")
    return found[0]


def _equal(what: str, found, expected) -> tuple[str, str | None]:
    alike = found == expected
    if type(found) is float and isinstance(expected, (int, float)):
        alike = abs(found - expected) <= TOLERANCE
    return what, None if alike else f"{found!r}, expected {expected!r}"


def geneval(folder: Path) -> Differences:
    """Compares the verdict of every case; also the prompts and the summary where they
    exist.
    """
    metadata = folder / "evaluation_metadata.jsonl"
    if metadata.is_file():
        official = [row for _, row in files.read_json_lines(metadata)]
        yield _equal("prompts", [json.dumps(p) for p in prompts()], [json.dumps(p) for p in official])
    results = []
    for where, case in recorded.read_cases(_one(folder, "scoring_cases.jsonl*")):
        verdict = recorded.score(case)
        results.append((prompts()[case["prompt_index"]], verdict.correct))
        yield f"case {case.get('case_id', where)}", "; ".join(recorded.disagreements(case, verdict)) or None
    if (folder / "scoring_summary.json").is_file():
        official, summary = read_json(folder / "scoring_summary.json"), summarize(results)
        yield _equal("total_images", summary["num_images"], official["total_images"])
        yield _equal("total_prompts", summary["num_prompts"], official["total_prompts"])
        yield _equal("correct_images", summary["correct_images"], official["correct_images"])
        yield _equal("correct_prompts", summary["correct_prompts"], official["correct_prompts"])
        yield _equal("overall", summary["overall"]["accuracy"], official["overall"])
        for task, expected in official["tasks"].items():
            skill = summary["skills"][task]
            found = {"correct": skill["correct"], "total": skill["num_images"]}
            yield _equal(task, found, {key: expected[key] for key in found})
            yield _equal(f"{task} score", skill["accuracy"], expected["score"])


def dpg(folder: Path) -> Differences:
    """Compares for every run the overall score, the items left out, every category and
    the pictures of every prompt.
    """
    rows = dpg_score.read_rows(folder / "scoring_questions.csv")
    answers = read_answers(_one(folder, "scoring_answers.jsonl*"))
    for run in read_json(folder / "scoring_expected.json")["runs"]:
        # Nothing is asked about a picture of an unknown prompt, so it may have no line
        # of answers.
        given = {item: answers.get(item, [])[: run["pic_num"]] for item in run["images"]}
        scores, name = dpg_score.official(rows, given), run["name"]
        yield _equal(f"{name} dpg_score", scores.overall, run["dpg_score"])
        yield _equal(f"{name} failed", scores.failed, sorted(run["failed"]))
        for level, found in (("l1", scores.broad), ("l2", scores.detailed)):
            yield _equal(f"{name} {level}", sorted(found), sorted(run[level]))
            for category in found.keys() & run[level].keys():
                expected = run[level][category]
                yield _equal(f"{name} {category} score", found[category].score, expected["score"])
                yield _equal(
                    f"{name} {category} questions", found[category].num_questions, expected["questions"]
                )
        yield _equal(f"{name} prompts", sorted(scores.per_prompt), sorted(run["per_prompt"]))
        for item in scores.per_prompt.keys() & run["per_prompt"].keys():
            found, expected = scores.per_prompt[item], run["per_prompt"][item]
            close = len(found) == len(expected["scores"]) and all(
                abs(a - b) <= TOLERANCE for a, b in zip(found, expected["scores"], strict=True)
            )
            yield f"{name} {item}", None if close else f"{found}, expected {expected['scores']}"
            yield _equal(f"{name} {item} average", sum(found) / len(found), expected["average"])
