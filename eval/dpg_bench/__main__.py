"""Score a model, pictures, or recorded answers on DPG-Bench.

    python -m eval.dpg_bench --ckpt runs/NAME/model --bench dpg_bench/     generates, asks a judge, scores
    python -m eval.dpg_bench --images FOLDER --bench dpg_bench/            asks about pictures of any origin
    python -m eval.dpg_bench score --answers FILE --questions dpg_bench.csv      recorded.py
    python -m eval.dpg_bench grids FOLDER --out GRIDS                            grids.py

--bench: the folder dpg_bench/ of github.com/TencentQQGYLab/ELLA, with the table of
questions and the prompts; it does not come with this project. --images: 2 x 2 grids as
the official script takes them (pictures.py) or, with --single, one sample per file.
Both modes of score.py are printed, the official one first.

--out receives answers.jsonl, summary.json, cache.jsonl (every answer, so that an
interrupted run resumes) and with --ckpt the pictures. Under a launcher (torchrun) every
rank generates its share, and the first rank asks and scores.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from eval import harness, layout
from eval.dpg_bench import pictures, score
from eval.dpg_bench.report import report
from mmtensorar import files, ranks

COMMANDS = {"score": "recorded", "grids": "grids"}


class Asked(NamedTuple):
    """A judge's answers: item -> per picture {question id: answer}; and what could not
    be asked.

    problems: a sentence for each missing, surplus or unreadable picture. unanswered:
    items with a picture that the table does not have, or that cannot be read.
    """

    answers: dict[str, list[dict[int, str]]]
    problems: list[layout.Problem]
    unanswered: list[str]


def ask(
    folder: Path,
    rows: Sequence[score.Question],
    judge,
    cache: Path,
    *,
    num_images: int,
    single: bool,
    allow_partial: bool,
) -> Asked:
    """Ask a judge every question about every picture.

    Args:
        folder: the pictures, of either kind (pictures.py).
        rows: the questions.
        judge: a `judges.Judge`.
        cache: file of answers; what it holds is not asked again.
        num_images: samples of each item.
        single: whether a file is one sample, not a grid.
        allow_partial: return what is missing instead of raising.

    Without allow_partial a missing, surplus or unreadable picture raises ValueError,
    before the first question unless the file has to be read for that.
    """
    from eval.dpg_bench.answers import Cache

    table = score.whole_table(rows)
    unanswered: set[str] = set()
    items, problems = pictures.survey(
        folder, table, num_samples=num_images, single=single, unknown=unanswered
    )
    if problems and not allow_partial:
        raise ValueError(layout.listed(folder, problems))
    cached = Cache(cache)
    answers: dict[str, list[dict[int, str]]] = {}
    total = num_images * len(items)
    with tqdm(total=total, unit="image", desc=f"asking about {folder}", file=sys.stderr) as bar:
        for item in items:
            try:
                samples = item.samples(num_images)
            except ValueError as error:
                if not allow_partial:
                    raise
                problems.append(layout.Problem("unreadable image", str(error)))
                unanswered.add(item.id)
                continue
            # If two rows have the same id, the last one counts.
            texts = {question.id: question.text for question in table[item.id]}
            answers[item.id] = []
            for sample in samples:
                given = cached.ask(judge, sample, list(texts.values()))
                answers[item.id].append(dict(zip(texts, given, strict=True)))
                bar.update()
    return Asked(answers, problems, sorted(unanswered))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.make_parser(
        "eval.dpg_bench",
        "Score a model, or pictures, on DPG-Bench.\n\n"
        "Other commands: score (recorded answers), grids (generated pictures in the official form).",
        example="--ckpt runs/NAME/model --bench dpg_bench/",
    )
    harness.add_options(
        parser,
        images="2 x 2 grids <item_id>.png, or a folder that --ckpt generated",
        num_images="samples per prompt, the first of a grid (default 4, with --single 1)",
    )
    parser.add_argument(
        "--bench", type=Path, required=True, metavar="FOLDER", help="dpg_bench/ of the ELLA repository"
    )
    parser.add_argument(
        "--judge",
        help="mplug, or a vision-language model's folder or hub id (default Qwen/Qwen2.5-VL-7B-Instruct)",
    )
    parser.add_argument("--single", action="store_true", help="a file is one sample, not a grid")
    return harness.parse(parser, arguments)


def evaluate(options: argparse.Namespace) -> None:
    """Generate or take pictures, ask the judge, print and write the scores.

    Raises ValueError.
    """
    if not harness.has_work(options):
        return
    table = options.bench / pictures.TABLE
    if not table.is_file():
        raise ValueError(
            f"{table} is missing; "
            "expected the folder dpg_bench/ of the ELLA repository (github.com/TencentQQGYLab/ELLA)"
        )
    rows = score.read_rows(table)
    num_cells = 1 if options.single else pictures.CELLS
    num_images = options.num_images or num_cells
    prompts = []
    if options.images is None:
        prompts = read_prompts(options.bench, rows)
    elif num_images > num_cells and not (options.images / layout.RECORD).is_file():
        raise ValueError(f"--num-images is {num_images}; a file holds {num_cells}")
    from eval.dpg_bench import judges

    judge = None
    if ranks.is_first():
        # A wrong path is reported before hours of generating.
        judge = judges.load(options.judge or judges.DEFAULT, options.device)
    given = harness.pictures(options, "dpg_bench", lambda generator: (prompts, num_images))
    if given is None:
        return
    changed = pictures.changed_prompts(given.folder, options.bench)
    layout.note(given.folder, changed)
    answers, problems, unanswered = ask(
        given.folder,
        rows,
        judge,
        given.out / "cache.jsonl",
        num_images=num_images,
        single=options.single,
        allow_partial=options.allow_partial,
    )
    if not answers:
        raise ValueError(layout.listed(given.folder, problems))
    scores = report(rows, table, given.folder, answers, judge.name, problems, unanswered)
    # A picture of a prompt that the table lacks has lines without answers, so that
    # scoring the recorded answers again gives the same scores.
    known = {row.item for row in rows}
    empty = {item: [{}] * num_images for item in unanswered if item not in known}
    files.write_json_lines(
        given.out / "answers.jsonl",
        (
            {"item_id": item, "image": number, "answers": {str(key): text for key, text in picture.items()}}
            for item, answered in (answers | empty).items()
            for number, picture in enumerate(answered)
        ),
    )
    facts = {
        "changed_prompts": changed or None,
        "num_images": num_images,
        "items_expected": len(known),
        "items_found": len(answers),
    }
    harness.write_summary(given.out, scores | harness.origin(given.folder) | facts)
    print(f"\n{given.out / 'summary.json'}")


def read_prompts(bench: Path, rows: Sequence[score.Question]) -> list[dict]:
    """The prompts of the bench.

    Raises ValueError when their items are not those of the table.
    """
    prompts = pictures.read_prompts(bench)
    if differing := sorted({row.item for row in rows} ^ {prompt["item_id"] for prompt in prompts}):
        raise ValueError(
            f"{bench}: {len(differing)} items have a prompt but no question, or no prompt: "
            f"{', '.join(differing[:5])}"
        )
    return prompts


@harness.command
def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments and arguments[0] in COMMANDS:
        module = importlib.import_module(f"eval.dpg_bench.{COMMANDS[arguments[0]]}")
        return module.main(arguments[1:])
    evaluate(parse(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
