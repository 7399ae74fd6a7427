"""Score a model, pictures, or recorded answers on DPG-Bench.

    python -m eval.dpg_bench --ckpt runs/NAME/model --bench dpg_bench/       generates, asks a judge, scores
    python -m eval.dpg_bench --images FOLDER --bench dpg_bench/              asks about pictures made by anyone
    python -m eval.dpg_bench score --answers answers.jsonl[.gz] --questions dpg_bench.csv [--num-images N] [--out FILE]

--bench: the folder dpg_bench/ of github.com/TencentQQGYLab/ELLA, which holds the table of questions and the prompts; bring
it along. --images: 2 x 2 grids as the official script takes them (pictures.py), or with --single one sample a file. Both
modes of score.py are printed, the official one first. --out receives answers.jsonl, summary.json, cache.jsonl (every answer
asked for, so that an interrupted run goes on) and with --ckpt the pictures. Under a launcher (torchrun) all ranks generate,
each its share, and the first one asks and scores.

`score` takes answers from elsewhere. A line is one picture: item_id, image (its number in the item's grid, from 0) and
answers {question id: text}.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from eval import (
    harness,
    layout,
    versions,
)
from eval.dpg_bench import pictures, score
from mmtensorar import files
from mmtensorar.sampling.settings import add_generation

if TYPE_CHECKING:
    from eval.dpg_bench.judges import Judge

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
    for where, row in files.read_json_lines(path):
        item, image, answers = row.get("item_id"), row.get("image"), row.get("answers")
        if not isinstance(item, str) or type(image) is not int or image < 0 or not isinstance(answers, dict):
            raise ValueError(
                f"{where}: expected item_id, image (0 or more) and answers, got {str(row)[:100]}"
            )
        if not all(key.isdecimal() and isinstance(text, str) for key, text in answers.items()):
            raise ValueError(f"{where}: expected answers as {{question id: text}}")
        if image in (pictures := found.setdefault(item, {})):
            raise ValueError(f"{where}: item {item} has picture {image} twice")
        pictures[image] = {int(key): text for key, text in answers.items()}
    for item, pictures in found.items():
        if sorted(pictures) != list(range(len(pictures))):
            raise ValueError(
                f"{path}: item {item} has pictures {', '.join(map(str, sorted(pictures)))}; expected them from 0 on"
            )
        if num_images is not None and len(pictures) < num_images:
            raise ValueError(f"{path}: item {item} has {len(pictures)} pictures; expected {num_images}")
    return {
        item: [pictures[n] for n in range(num_images or len(pictures))] for item, pictures in found.items()
    }


def as_dict(scores: score.Scores) -> dict:
    """Scores for a JSON file."""

    def categories(found: dict[str, score.Category]) -> dict:
        return {
            name: {"score": category.score, "num_questions": category.num_questions}
            for name, category in found.items()
        }

    prompts = {
        item: {"scores": each, "average": sum(each) / len(each)} for item, each in scores.per_prompt.items()
    }
    parts = {
        "broad": categories(scores.broad),
        "detailed": categories(scores.detailed),
        "per_prompt": prompts,
    }
    return {
        "dpg_score": scores.overall,
        **parts,
        "failed": scores.failed,
        "unknown_parents": scores.unknown_parents,
    }


def render(name: str, scores: score.Scores) -> str:
    """Overall and categories of one mode, as text."""
    left_out = f"; left out: {', '.join(scores.failed)}" if scores.failed else ""
    passed = (
        f"; {scores.unknown_parents} parents that the table lacks passed over"
        if scores.unknown_parents
        else ""
    )
    text = [
        f"{name}: DPG-Bench score {scores.overall:.4f}, {len(scores.per_prompt)} prompts{left_out}{passed}"
    ]
    for level in (scores.broad, scores.detailed):
        text += [
            f"  {category:<28}{found.score:>9.4f}  {found.num_questions:>6} questions"
            for category, found in level.items()
        ]
    return "\n".join(text)


def report(
    rows: Sequence[score.Question],
    table: Path,
    answers: score.Answers,
    judge: str,
    partial: Sequence[str] = (),
) -> dict:
    """Print both modes; returns them with what they are of, for a JSON file."""
    blob = git_blob_id(table)
    which = (
        "the official table"
        if blob == OFFICIAL_TABLE
        else f"NOT the official table, which is {OFFICIAL_TABLE}"
    )
    print(f"questions: {table}, git blob {blob}: {which}\njudge: {judge}\n")
    mark = (
        f" (PARTIAL, {'; '.join(partial[:3])}{f'; and {len(partial) - 3} more' if len(partial) > 3 else ''})"
        if partial
        else ""
    )
    official = score.official(rows, answers)
    print(render(f"official{mark}", official))
    try:
        corrected = score.corrected(rows, answers)
        print("\n" + render("corrected", corrected))
    except ValueError as error:
        corrected = None
        print(f"\ncorrected: there is no such score, {error}")
    given = Counter(
        text if text in ("yes", "no") else "other"
        for each in answers.values()
        for one in each
        for text in one.values()
    )
    return {
        "benchmark": "dpg_bench",
        "judge": judge,
        "questions": str(table),
        "git_blob": blob,
        "is_official_table": blob == OFFICIAL_TABLE,
        "partial": list(partial) or None,
        "answers_given": dict(given),
        "official": as_dict(official),
        "corrected": corrected and as_dict(corrected),
    }


def gaps(rows: Sequence[score.Question], answers: score.Answers) -> list[str]:
    """What answers lack of the table, and what they have beside it, in words."""
    items = {row.item for row in rows}
    most = max(map(len, answers.values()), default=0)
    fewer = [item for item, pictures in answers.items() if len(pictures) < most]
    kinds = {
        "without answers": items - answers.keys(),
        "that the table lacks": answers.keys() - items,
        "with fewer pictures": fewer,
    }
    return [f"{len(found)} items {kind}, such as {min(found)}" for kind, found in kinds.items() if found]


def score_answers(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eval.dpg_bench score", description="Recorded answers to scores."
    )
    parser.add_argument("--answers", type=Path, required=True, metavar="FILE", help=".jsonl or .jsonl.gz")
    parser.add_argument(
        "--questions", type=Path, required=True, metavar="FILE", help="the table, dpg_bench.csv"
    )
    parser.add_argument(
        "--num-images", type=int, metavar="N", help="first pictures of each item to count (default: all)"
    )
    parser.add_argument("--judge", default="not told", help="who gave the answers; stands beside the score")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write everything as JSON")
    options = parser.parse_args(arguments)
    harness.check_numbers(options, num_images=1)
    rows = score.read_rows(options.questions)
    answers = read_answers(options.answers, options.num_images)
    found = report(rows, options.questions, answers, options.judge, gaps(rows, answers))
    if options.out is not None:
        files.write_text(options.out, json.dumps(found, indent=2) + "\n")
        print(f"\n{options.out}")


def ask(
    folder: Path,
    rows: Sequence[score.Question],
    judge: Judge,
    cache: Path,
    *,
    num_images: int,
    single: bool,
    allow_partial: bool,
) -> tuple[dict[str, list[dict[int, str]]], list[str]]:
    """item -> per picture {question id: answer}; and what is missing, too many or unreadable, in words.

    Without allow_partial that is a ValueError, before anything is asked where a file's absence tells it.
    """
    from eval.dpg_bench.answers import Cache

    table = score.whole_table(rows)
    items, problems = pictures.survey(folder, table, num_samples=num_images, single=single)
    if problems and not allow_partial:
        raise ValueError(layout.listed(folder, problems))
    known = Cache(cache)
    answers: dict[str, list[dict[int, str]]] = {}
    with tqdm(
        total=num_images * len(items), unit="image", desc=f"asking about {folder}", file=sys.stderr
    ) as bar:
        for item in items:
            try:
                samples = item.samples(num_images)
            except ValueError as error:
                if not allow_partial:
                    raise
                problems.append(str(error))
                continue
            texts = {
                question.id: question.text for question in table[item.id]
            }  # of two rows with one id the last counts
            answers[item.id] = []
            for sample in samples:
                answers[item.id].append(
                    dict(zip(texts, known.ask(judge, sample, list(texts.values())), strict=True))
                )
                bar.update()
    return answers, problems


def evaluate(options: argparse.Namespace) -> None:
    if options.images is not None and not harness.scores():
        return
    table = options.bench / pictures.TABLE
    if not table.is_file():
        raise ValueError(
            f"{table} is missing; expected the folder dpg_bench/ of the ELLA repository (github.com/TencentQQGYLab/ELLA)"
        )
    rows = score.read_rows(table)
    num_images = options.num_images or (1 if options.single else pictures.CELLS)
    if options.images is None:
        prompts = pictures.read_prompts(options.bench)
        if strange := sorted({row.item for row in rows} ^ {prompt["item_id"] for prompt in prompts}):
            raise ValueError(
                f"{options.bench}: {len(strange)} items have a prompt but no question, or no prompt: {', '.join(strange[:5])}"
            )
    elif (
        num_images > (most := 1 if options.single else pictures.CELLS)
        and not (options.images / layout.RECORD).is_file()
    ):
        raise ValueError(f"--num-images is {num_images}; a file holds {most}")
    from eval.dpg_bench import judges

    judge = None
    if harness.scores():
        judge = judges.load(
            options.judge or judges.DEFAULT, options.device
        )  # a wrong path is told before hours of generating
    if options.images is not None:
        harness.ignored(options)
        folder, out = (
            options.images,
            options.out or Path("runs/eval") / f"{options.images.resolve().name}_dpg_bench",
        )
    else:
        folder = out = harness.generate_into(options, harness.load(options), "dpg_bench", prompts, num_images)
        if judge is None:
            return
    what = dict(num_images=num_images, single=options.single, allow_partial=options.allow_partial)
    answers, problems = ask(folder, rows, judge, out / "cache.jsonl", **what)
    if not answers:
        raise ValueError(layout.listed(folder, problems))
    found = report(rows, table, answers, judge.name, problems)
    record = layout.read_record(folder)
    told: dict[str, Any] = {
        "images": str(folder),
        "num_images": num_images,
        "items_expected": len({row.item for row in rows}),
        "items_found": len(answers),
        "checkpoint": record.get("checkpoint"),
        "seed": record.get("seed"),
        "generation": record or None,
        "versions": versions.installed(),
    }
    files.write_json_lines(
        out / "answers.jsonl",
        (
            {"item_id": item, "image": number, "answers": {str(key): text for key, text in picture.items()}}
            for item, given in answers.items()
            for number, picture in enumerate(given)
        ),
    )
    files.write_text(out / "summary.json", json.dumps(found | told, indent=2) + "\n")
    print(f"\n{out / 'summary.json'}")


def score_pictures(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eval.dpg_bench",
        description="DPG-Bench. `score --answers FILE` takes recorded answers, `grids FOLDER` writes the official pictures.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ckpt", type=Path, help="consolidated checkpoint, such as runs/NAME/model")
    source.add_argument(
        "--images", type=Path, metavar="FOLDER", help="2 x 2 grids <item_id>.png, or what --ckpt generated"
    )
    parser.add_argument(
        "--bench", type=Path, required=True, metavar="FOLDER", help="dpg_bench/ of the ELLA repository"
    )
    parser.add_argument(
        "--judge",
        help="mplug, or a vision-language model's folder or hub id (default Qwen/Qwen2.5-VL-7B-Instruct)",
    )
    parser.add_argument(
        "--out", type=Path, help="default: runs/eval/NAME of the checkpoint's run, or of the pictures' folder"
    )
    parser.add_argument(
        "--num-images", type=int, help="samples per prompt, the first of a grid (default 4, with --single 1)"
    )
    parser.add_argument("--single", action="store_true", help="a file is one sample, and no grid")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help="score what is there; the score is marked partial wherever it is printed",
    )
    add_generation(parser, needs=", with --ckpt")
    options = parser.parse_args(arguments)
    harness.check_numbers(options, num_images=1, seed=0)
    evaluate(options)


def write_grids(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eval.dpg_bench grids",
        description="Generated pictures as the official script takes them: <item_id>.png, 2 x 2.",
    )
    parser.add_argument("folder", type=Path, help="what --ckpt generated")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    options = parser.parse_args(arguments)
    written = 0
    for images in layout.image_files(options.folder, num_images=pictures.CELLS):
        place = images[0].parent.parent / "metadata.jsonl"
        item = files.read_json(place).get("item_id")
        if not isinstance(item, str) or not item or "/" in item or item.startswith("."):
            raise ValueError(f"{place}: item_id is {item!r}; expected a name, as --ckpt writes it")
        pictures.write_grid([layout.open_image(path) for path in images], options.out / f"{item}.png")
        written += 1
    print(f"{written} grids in {options.out}")


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"score": score_answers, "grids": write_grids}
    try:
        if arguments and arguments[0] in commands:
            commands[arguments[0]](arguments[1:])
        else:
            score_pictures(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from what there is", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
