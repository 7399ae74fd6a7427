"""Pictures to scores on a suite of GenEval-style prompts: options, generation,
detection, verdicts, files.

The command is `python -m eval.geneval`; `watch` calls the same functions for each saved
step.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from eval import harness, layout, report_table
from eval.geneval import ceiling, report, suites
from eval.geneval.score import by_class, judge, summarize
from eval.geneval.suites import Suite
from eval.layout import Problem
from mmtensorar import files, ranks
from worlds.shapes.detect import Detector

# ---- pictures to verdicts ------------------------------------------------------------------------


def score(
    suite: Suite,
    folder: Path,
    *,
    num_images: int,
    batch_size: int = 16,
    allow_partial: bool = False,
) -> tuple[list[dict], list[Problem]]:
    """Judge every picture of a folder.

    Args:
        suite: the prompts, detector and scorer settings.
        folder: pictures in the layout of eval/layout.py.
        num_images: how many pictures of each of the suite's prompts there must be.
        batch_size: pictures that are in memory, and detected, at a time.
        allow_partial: return what is missing instead of raising.

    Returns one result per picture, with the keys of the official scorer plus
    detections, and a sentence for each picture or prompt that is missing, surplus or
    unreadable. Without allow_partial such a problem raises ValueError.
    """
    pictures, problems = layout.survey(folder, num_prompts=len(suite.prompts), num_images=num_images)
    each = f"{num_images} image{'s' * (num_images > 1)} each"
    whole = f"a whole set of suite {suite.name} ({len(suite.prompts)} prompts, {each})"

    def check() -> None:
        if problems and not allow_partial:
            raise ValueError(
                f"not {whole}; --allow-partial scores it all the same: {layout.listed(folder, problems)}"
            )

    check()
    prompts = [suites.read_metadata(images[0].parent.parent / "metadata.jsonl", suite) for images in pictures]
    # As many folders as the suite has prompts, and each with another prompt of it: no
    # prompt is missing.
    problems += foreign_prompts(suite, prompts, pictures)
    check()
    names = [images[0].parent.parent.name for images in pictures]
    layout.note(folder, changed_texts(suite, zip(names, prompts, strict=True)))
    detector = suite.detector()
    results = []
    work = [(metadata, path) for metadata, images in zip(prompts, pictures, strict=True) for path in images]
    with tqdm(total=len(work), unit="image", desc=f"scoring {folder}", file=sys.stderr) as bar:
        for start in range(0, len(work), batch_size):
            batch = work[start : start + batch_size]
            results += _judged(suite, detector, folder, batch, problems)
            bar.update(len(batch))
    check()
    return results, problems


def _judged(
    suite: Suite,
    detector: Detector,
    folder: Path,
    batch: Iterable[tuple[dict, Path]],
    problems: list[Problem],
) -> list[dict]:
    """Results of one batch of (metadata, path); adds a problem for each picture that
    cannot be read.
    """
    readable: list[tuple[dict, Path]] = []
    images: list[Image.Image] = []
    for metadata, path in batch:
        try:
            images.append(layout.open_image(path))
            readable.append((metadata, path))
        except ValueError as error:  # reported with all others, by `score`
            sentence = str(error).replace(f"{folder}{os.sep}", "")
            problems.append(Problem("unreadable image", sentence))
    colored = [
        [clause["class"] for clause in metadata["include"] if "color" in clause] for metadata, _ in readable
    ]
    results = []
    detected = detector.detect_batch(images, colored)
    for (metadata, path), detections in zip(readable, detected, strict=True):
        verdict = judge(metadata, *by_class(detections), suite.settings)
        results.append(
            {
                "filename": str(path.relative_to(folder)),
                "tag": metadata["tag"],
                "prompt": metadata["prompt"],
                "correct": verdict.correct,
                "reason": verdict.reason,
                "metadata": json.dumps(metadata),
                "detections": [asdict(detection) for detection in detections],
            }
        )
    return results


def foreign_prompts(
    suite: Suite, prompts: Sequence[dict], pictures: Sequence[Sequence[Path]]
) -> list[Problem]:
    """A sentence for each folder whose prompt the suite does not have, or has in fewer
    folders.

    Prompts are compared by what they ask for, not by their text.
    """
    left = Counter(map(_demand, suite.prompts))
    problems = []
    for metadata, images in zip(prompts, pictures, strict=True):
        left[_demand(metadata)] -= 1
        if left[_demand(metadata)] < 0:
            name = images[0].parent.parent.name
            sentence = f"not a prompt of suite {suite.name}, or one that other folders have"
            problems.append(Problem("foreign prompt", f"{name}/metadata.jsonl: {sentence}"))
    return problems


def changed_texts(suite: Suite, prompts: Iterable[tuple[str, dict]]) -> list[Problem]:
    """A sentence for each folder whose prompt asks for what a prompt of the suite asks
    for, in another text.

    They are scored: GenEval's own script never reads the text. But the scores are those
    of other prompts.

    prompts: (name of the folder, metadata).
    """
    left: dict[str, list[str]] = {}
    for prompt in suite.prompts:
        left.setdefault(_demand(prompt), []).append(prompt["prompt"])
    changed = []
    for name, metadata in dict(prompts).items():
        texts = left.get(_demand(metadata), [])
        if metadata["prompt"] in texts:
            texts.remove(metadata["prompt"])
        else:
            changed.append((name, metadata["prompt"], texts))
    # Without a text that is left, the prompt is foreign.
    return [layout.changed_prompt(name, found, texts.pop(0)) for name, found, texts in changed if texts]


def _demand(metadata: dict) -> str:
    return json.dumps([metadata["tag"], metadata["include"], metadata.get("exclude", [])], sort_keys=True)


# ---- files ---------------------------------------------------------------------------------------


def write(
    out: Path, folder: Path, suite: Suite, results: list[dict], problems: list[Problem], facts: dict
) -> dict:
    """Write results.jsonl, report.html and, last, summary.json; returns the summary.

    Args:
        out: where they go.
        folder: where the pictures are.
        suite: what they were scored on.
        results, problems: as `score` returns them.
        facts: further entries of the summary.
    """
    origin = harness.origin(folder)
    judged = [(result["filename"].partition("/")[0], json.loads(result["metadata"])) for result in results]
    summary = {
        "suite": suite.name,
        "detector": suite.detector().name,
        "scorer": asdict(suite.settings),
        "images": origin.pop("images"),
        "partial": problems or None,
        "partial_numbers": layout.numbers(problems) or None,
        "changed_prompts": changed_texts(suite, judged) or None,
        **origin,
        **summarize(
            (metadata, result["correct"]) for (_, metadata), result in zip(judged, results, strict=True)
        ),
        **facts,
    }
    out.mkdir(parents=True, exist_ok=True)
    files.write_text(out / "results.jsonl", "".join(json.dumps(result) + "\n" for result in results))
    files.write_text(out / "report.html", report.page(summary, results, folder))
    return harness.write_summary(out, summary)


# ---- the command ---------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command. Raises ValueError for a number that is too small."""
    parser = harness.make_parser(
        "eval.geneval",
        "Score a model, or pictures, on GenEval-style prompts.\n\n"
        "Other commands: score (recorded detections), compare (models on the same prompts),\n"
        "watch (the saved steps of a run), self-test and convert-detector (suite geneval's detector);\n"
        "python -m eval.geneval.ceiling measures the bounds of suite shapes.",
        example="--ckpt runs/NAME/model --suite shapes",
    )
    harness.add_options(
        parser,
        images="a folder of pictures in GenEval's layout; nothing is generated",
        out="default: runs/eval/NAME of the model's run, or the pictures' folder",
        num_images=f"per prompt (default {suites.NUM_IMAGES}, or as generated)",
    )
    parser.add_argument(
        "--suite", default="geneval", help=f"one of {', '.join(suites.SUITES)} (default geneval)"
    )
    parser.add_argument("--num-prompts", type=int, metavar="N", help="per skill; default: all of the suite")
    parser.add_argument(
        "--num-bound-images",
        type=int,
        default=300,
        metavar="N",
        help="pictures drawn to measure ceiling and chance (default 300; 0: do not measure)",
    )
    suites.add_detector(parser)
    parser.add_argument(
        "--no-self-test",
        action="store_true",
        help="score even with a detector that fails `self-test`; the summary records it",
    )
    return harness.parse(parser, arguments, num_bound_images=0)


def evaluate(options: argparse.Namespace) -> None:
    """Generate or take pictures, score them, write the files and print the table.

    Raises ValueError.
    """
    if not harness.has_work(options):
        return
    choice = suites.DetectorChoice(options.detector, options.clip, options.device)
    suite = suites.load(options.suite, options.num_prompts, choice)
    if options.images is not None and options.num_prompts is None:
        suite = as_generated(suite, options.images, choice)
    num_skills = len(suite.skills)
    if 0 < options.num_bound_images < num_skills:
        raise ValueError(
            f"--num-bound-images is {options.num_bound_images}; expected 0, or at least one per skill, "
            f"{num_skills}"
        )
    tested = None
    if ranks.is_first():
        # A broken detector is reported before hours of generating.
        tested = "left out" if options.no_self_test else suite.detector().self_test()
    num_images = options.num_images or suites.NUM_IMAGES
    pictures = harness.pictures(
        options, suite.name, lambda generator: (suite.prompts, num_images), default_out=options.images
    )
    if pictures is None:
        return
    if options.images is not None and options.num_images is None and pictures.folder.is_dir():
        recorded = layout.read_record(pictures.folder).get("num_images")
        num_images = recorded if type(recorded) is int and recorded > 0 else num_images
    results, problems = score(
        suite,
        pictures.folder,
        num_images=num_images,
        batch_size=options.batch_size,
        allow_partial=options.allow_partial,
    )
    bounds = {}
    if suite.picture is not None and options.num_bound_images:
        bounds = ceiling.measure(suite, pictures.image_tokenizer, num_images=options.num_bound_images)
    facts = {
        "prompts_expected": len(suite.prompts),
        "images_expected": len(suite.prompts) * num_images,
        "self_test": tested,
        **bounds,
    }
    out = pictures.out
    summary = write(out, pictures.folder, suite, results, problems, facts)
    layout.note(pictures.folder, problems)
    print(report_table.render({out.resolve().name: summary}))
    print(f"\n{out / 'summary.json'}\n{out / 'report.html'}")


def as_generated(suite: Suite, folder: Path, choice: suites.DetectorChoice) -> Suite:
    """The suite with as many prompts as a folder's pictures were generated for
    (--num-prompts).

    Returns the given suite where generation.json is missing, or is about other prompts.
    """
    record = layout.read_record(folder) if folder.is_dir() else {}
    num_prompts = record.get("num_prompts")
    if record.get("suite") != suite.name or type(num_prompts) is not int:
        return suite
    per_skill, rest = divmod(num_prompts, len(suite.skills))
    if rest or not per_skill:
        return suite
    try:
        smaller = suites.load(suite.name, per_skill, choice)
    except ValueError:  # more than the suite has
        return suite
    return smaller if harness.prompts_hash(smaller.prompts) == record.get("prompts_sha256") else suite
