"""The highest score that a suite allows, and the score of chance: bounds to compare
scores with.

    python -m eval.geneval.ceiling [--image-tokenizer PATH] [--num-images 1000] [--out FILE.json]

drawn         share of correctly drawn pictures that detector and scorer confirm
round trip    the same pictures after the image tokenizer's encoder and decoder: no model of its
              codes can be expected to score higher
chance        per prompt the share of pictures drawn for other prompts (of all skills) that pass as
              correct: the score of a model that draws perfectly and ignores its prompt
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eval.geneval import suites
from eval.geneval.score import by_class, judge
from eval.geneval.suites import Suite
from eval.intervals import wilson
from mmtensorar.checkpoints.options import add_image_tokenizer
from mmtensorar.cli import Parser, command
from mmtensorar.files import write_text

if TYPE_CHECKING:
    from mmtensorar.image_tokenizers import ImageTokenizer

DRAWN_SIZE = 64  # pixels, where no image tokenizer sets the size

Detected = list[tuple[dict, dict]]  # per picture what `judge` takes: rows and colours by class


def measure(
    suite: Suite, image_tokenizer: ImageTokenizer | None = None, *, num_images: int = 300
) -> dict[str, dict]:
    """{ceiling: {drawn, round_trip (with an image tokenizer)}, chance}, as described at
    the top.

    Each bound is {num_images, skills {skill: share}, overall}, overall being the mean
    of the skills; the ceilings also have each skill's 95 % interval. Raises ValueError
    when the suite cannot draw pictures, or for fewer pictures than skills.
    """
    skills = list(dict.fromkeys(prompt["tag"] for prompt in suite.prompts))
    if suite.picture is None:
        raise ValueError(f"suite {suite.name} cannot draw pictures, so it has no measured ceiling")
    if num_images < len(skills):
        raise ValueError(f"number of images is {num_images}; expected at least one per skill, {len(skills)}")
    detector = suite.detector()
    size = DRAWN_SIZE if image_tokenizer is None else image_tokenizer.image_size
    drawn = [suite.picture(number, size) for number in range(num_images)]
    prompts, images = [metadata for metadata, _ in drawn], [image for _, image in drawn]
    detected = [by_class(detector.detect(image)) for image in images]
    ceiling = {"drawn": _ceiling(suite, skills, prompts, detected)}
    if image_tokenizer is not None:
        from mmtensorar.image_tokenizers import round_trip

        decoded = [by_class(detector.detect(image)) for image in round_trip(image_tokenizer, images)]
        ceiling["round_trip"] = _ceiling(suite, skills, prompts, decoded)
    return {"ceiling": ceiling, "chance": _chance(suite, skills, prompts, detected)}


def _ceiling(suite: Suite, skills: list[str], prompts: list[dict], detected: Detected) -> dict:
    verdicts: dict[str, list[bool]] = {skill: [] for skill in skills}
    for metadata, detections in zip(prompts, detected, strict=True):
        verdicts[metadata["tag"]].append(judge(metadata, *detections, suite.settings).correct)
    return _bound(len(detected), {skill: sum(v) / len(v) for skill, v in verdicts.items()}) | {
        "intervals": {skill: list(wilson(sum(v), len(v))) for skill, v in verdicts.items()}
    }


def _chance(suite: Suite, skills: list[str], prompts: list[dict], detected: Detected) -> dict:
    shares: dict[str, list[float]] = {skill: [] for skill in skills}
    for metadata in suite.prompts:
        # Two captions may ask for the same objects in different words.
        foreign = [
            detections
            for other, detections in zip(prompts, detected, strict=True)
            if other["include"] != metadata["include"]
        ]
        passed = sum(judge(metadata, *detections, suite.settings).correct for detections in foreign)
        shares[metadata["tag"]].append(passed / max(1, len(foreign)))
    return _bound(len(detected), {skill: float(np.mean(values)) for skill, values in shares.items()})


def _bound(num_images: int, skills: dict[str, float]) -> dict:
    return {"num_images": num_images, "skills": skills, "overall": float(np.mean(list(skills.values())))}


@command
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m eval.geneval.ceiling",
        description="Measure the highest score that a suite allows, and the score of chance.",
        example="--image-tokenizer recipes/tiny/weights/base/image_tokenizer",
    )
    parser.add_argument("--suite", default="shapes", help="a suite that can draw pictures: shapes")
    add_image_tokenizer(parser, required=False)
    parser.add_argument("--num-images", type=int, default=1000, metavar="N", help="default 1000")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the numbers as JSON")
    options = parser.parse_args(arguments)
    suite = suites.load(options.suite)
    image_tokenizer = None
    # Imported here, since torch takes seconds.
    from mmtensorar.checkpoints.recognise import image_tokenizer_from_arguments

    if options.image_tokenizer is not None:
        image_tokenizer, _ = image_tokenizer_from_arguments(options)
    bounds = measure(suite, image_tokenizer, num_images=options.num_images)
    if options.out is not None:
        content = {
            "suite": suite.name,
            "detector": suite.detector().name,
            "image_tokenizer": options.image_tokenizer,
            **bounds,
        }
        write_text(options.out, json.dumps(content, indent=2) + "\n")
    for name, bound in (bounds["ceiling"] | {"chance": bounds["chance"]}).items():
        skills = "  ".join(f"{skill} {100 * share:.1f}" for skill, share in bound["skills"].items())
        overall = f"{100 * bound['overall']:5.1f} % of {bound['num_images']} pictures"
        print(f"{name.replace('_', ' '):11} {overall}   {skills}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
