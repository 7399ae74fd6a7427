"""Score a model, or images, on a suite of GenEval-style prompts.

    python -m eval.geneval --ckpt runs/NAME/model [--suite shapes]     generates, then scores
    python -m eval.geneval --images FOLDER [--suite shapes]            scores images in GenEval's layout

--out receives results.jsonl (one line per image), summary.json, report.html and, with --ckpt, the images. An interrupted
generation goes on where it stopped when the same command is given again; scoring starts over. Under a launcher (torchrun) all ranks generate, each its
share, and the first one scores. Other commands: `python -m eval.geneval score` scores
recorded detections (recorded.py), `compare` sets models side by side (compare.py), `watch` scores a run's checkpoints as they
come (watch.py), `self-test` and `convert-detector` are
of suite geneval's detector, `python -m eval.geneval.ceiling` draws the shapes suite's bounds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from eval import (
    harness,
    layout,
    report_table,
    versions,
)
from eval.geneval import ceiling, report
from eval.geneval import suite as suites
from eval.geneval.score import by_class, judge, summarize
from eval.geneval.suite import Suite
from mmtensorar import files
from mmtensorar.sampling.settings import add_generation

COMMANDS = {
    "score": "recorded",
    "compare": "compare",
    "convert-detector": "convert_detector",
    "self-test": "self_test",
    "watch": "watch",
}


def score(
    suite: Suite,
    folder: Path,
    *,
    num_prompts: int | None,
    num_images: int | None,
    batch_size: int = 16,
    allow_partial: bool = False,
) -> tuple[list[dict], list[str]]:
    """One result per image, under the official scorer's names (which has no detections); batch_size images are in memory.

    Also returns what is missing, too many or unreadable, in words; without allow_partial that is a ValueError.
    """
    pictures, problems = layout.survey(folder, num_prompts=num_prompts, num_images=num_images)
    if problems and not allow_partial:
        raise ValueError(layout.listed(folder, problems))
    prompts = [suites.read_metadata(images[0].parent.parent / "metadata.jsonl", suite) for images in pictures]
    if suite.is_whole:
        problems += strange(suite, prompts, pictures)
        if problems and not allow_partial:
            raise ValueError(layout.listed(folder, problems))
    detector = suite.detector()
    results = []
    work = [(metadata, path) for metadata, images in zip(prompts, pictures, strict=True) for path in images]
    with tqdm(total=len(work), unit="image", desc=f"scoring {folder}", file=sys.stderr) as bar:
        for start in range(0, len(work), batch_size):
            part, images = [], []
            for metadata, path in work[start : start + batch_size]:
                bar.update()
                try:
                    images.append(layout.open_image(path))
                    part.append((metadata, path))
                except ValueError as error:  # told below with all others
                    problems.append(str(error).replace(f"{folder}{os.sep}", ""))
            colored = [
                [clause["class"] for clause in metadata["include"] if "color" in clause]
                for metadata, _ in part
            ]
            found = detector.detect_batch(images, colored)
            for (metadata, path), detections in zip(part, found, strict=True):
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
    if problems and not allow_partial:
        raise ValueError(layout.listed(folder, problems))
    return results, problems


def strange(suite: Suite, prompts: list[dict], files: list[list[Path]]) -> list[str]:
    """The folders whose prompt the suite does not have, or not so often, in words. A prompt is what it asks for, not its text."""
    left = Counter(map(asked, suite.prompts))
    problems = []
    for metadata, images in zip(prompts, files, strict=True):
        left[asked(metadata)] -= 1
        if left[asked(metadata)] < 0:
            place = images[0].parent.parent.name
            problems.append(
                f"{place}/metadata.jsonl is of no prompt of suite {suite.name}, or of one that other folders have"
            )
    return problems


def asked(metadata: dict) -> str:
    return json.dumps([metadata["tag"], metadata["include"], metadata.get("exclude", [])], sort_keys=True)


def write(
    out: Path, folder: Path, suite: Suite, results: list[dict], problems: list[str], facts: dict
) -> dict:
    """Write results.jsonl, report.html and summary.json, which comes last; returns the summary. facts: what it also holds."""
    record = layout.read_record(folder)
    summary = {
        "suite": suite.name,
        "detector": suite.detector().name,
        "scorer": asdict(suite.settings),
        "images": str(folder),
        "partial": problems or None,
        "checkpoint": record.get("checkpoint"),
        "seed": record.get("seed"),
        "generation": record or None,
        **summarize((json.loads(result["metadata"]), result["correct"]) for result in results),
        **facts,
        "versions": versions.installed(),
    }
    out.mkdir(parents=True, exist_ok=True)
    files.write_text(out / "results.jsonl", "".join(json.dumps(result) + "\n" for result in results))
    files.write_text(out / "report.html", report.page(summary, results, folder))
    files.write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def expected(suite: Suite, folder: Path, options: argparse.Namespace) -> dict[str, int | None]:
    """How many prompts and images of each there must be in a folder: as asked for, as generated, or as the suite has them.

    None where nothing tells: then as many as the most that are there.
    """
    record = layout.read_record(folder) if folder.is_dir() else {}
    num_prompts, num_images = record.get("num_prompts"), record.get("num_images")
    if suite.is_whole:
        num_prompts, num_images = num_prompts or len(suite.prompts), num_images or suites.NUM_IMAGES
    if options.num_prompts is not None:
        num_prompts = len(suite.prompts)
    return dict(num_prompts=num_prompts, num_images=options.num_images or num_images)


def evaluate(options: argparse.Namespace) -> None:
    if options.images is not None and not harness.scores():
        return
    choice = suites.DetectorChoice(options.detector, options.clip, options.device)
    suite = suites.load(options.suite, options.num_prompts, choice)
    if 0 < options.num_bound_images < (least := len({prompt["tag"] for prompt in suite.prompts})):
        raise ValueError(
            f"--num-bound-images is {options.num_bound_images}; expected 0, or at least one per skill, {least}"
        )
    tested = None
    if harness.scores():
        # What is wrong with the detector is told before hours of generating.
        tested = "left out" if options.no_self_test else suite.detector().self_test()
    image_tokenizer = None
    if options.images is not None:
        harness.ignored(options)
        folder, out = options.images, options.out or options.images
        sizes = expected(suite, folder, options)
    else:
        options.num_images = options.num_images or suites.NUM_IMAGES
        generator = harness.load(options)
        folder = out = harness.generate_into(
            options, generator, suite.name, suite.prompts, options.num_images
        )
        image_tokenizer = generator.image_tokenizer
        if not harness.scores():
            return
        sizes = dict(num_prompts=len(suite.prompts), num_images=options.num_images)
    results, problems = score(
        suite, folder, **sizes, batch_size=options.batch_size, allow_partial=options.allow_partial
    )
    bounds = {}
    if suite.picture is not None and options.num_bound_images:
        bounds = ceiling.measure(suite, image_tokenizer, num_images=options.num_bound_images)
    all_images = None if None in sizes.values() else sizes["num_prompts"] * sizes["num_images"]
    facts = {"images_expected": all_images, "self_test": tested, **bounds}
    summary = write(out, folder, suite, results, problems, facts)
    print(report_table.render({out.resolve().name: summary}))
    print(f"\n{out / 'summary.json'}\n{out / 'report.html'}")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        # Some need torch, which takes seconds to import.
        return importlib.import_module(f"eval.geneval.{COMMANDS[arguments[0]]}").main(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m eval.geneval", description="Score a model, or images, on GenEval-style prompts."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ckpt", type=Path, help="consolidated checkpoint, such as runs/NAME/model")
    source.add_argument(
        "--images", type=Path, metavar="FOLDER", help="images in GenEval's layout; nothing is generated"
    )
    parser.add_argument(
        "--suite", default="geneval", help=f"one of {', '.join(suites.SUITES)} (default geneval)"
    )
    parser.add_argument(
        "--out", type=Path, help="default: runs/eval/NAME of the checkpoint's run, or the images' folder"
    )
    parser.add_argument("--num-prompts", type=int, help="per skill; default: the suite's own number")
    parser.add_argument(
        "--num-images", type=int, help=f"per prompt (default {suites.NUM_IMAGES}, or as generated)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--num-bound-images",
        type=int,
        default=300,
        help="pictures drawn for ceiling and chance (default 300, 0 is none)",
    )
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help="score what is there; the score is marked partial wherever it is printed",
    )
    suites.add_detector(parser)
    parser.add_argument(
        "--no-self-test",
        action="store_true",
        help="score also with a detector that fails `self-test`; the summary tells",
    )
    add_generation(parser, needs=", with --ckpt")
    options = parser.parse_args(arguments)
    try:
        harness.check_numbers(options, num_images=1, seed=0, num_bound_images=0)
        evaluate(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the images made so far", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
