"""What a score can reach and what chance reaches: bounds to read a suite's scores by.

    python -m eval.geneval.ceiling [--image-tokenizer FOLDER] [--num-images 1000] [--out FILE.json]

drawn         share of correctly drawn pictures that detector and scorer confirm
round trip    the same pictures encoded and decoded by the image tokenizer: no model of its codes can be expected to
              score higher
chance        per prompt the share of drawn pictures for other prompts (of all skills) that pass as correct, so what a
              model scores that draws perfectly and ignores its prompt
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.geneval import suite as suites
from eval.geneval.score import by_class, judge, wilson
from eval.geneval.suite import Suite
from mmtensorar.files import write_text

DRAWN_SIZE = 64  # pixels, where no image tokenizer says otherwise


def measure(suite: Suite, image_tokenizer: Any = None, *, num_images: int = 300) -> dict[str, dict]:
    """{ceiling: {drawn, round_trip (with an image tokenizer)}, chance}, as described at the top.

    Each bound is {num_images, skills {skill: share}, overall}, overall being the mean of the skills; the ceilings also
    have each skill's 95 % interval. Raises ValueError when the suite cannot draw pictures or there are fewer than skills.
    """
    skills = list(dict.fromkeys(prompt["tag"] for prompt in suite.prompts))
    if suite.picture is None:
        raise ValueError(f"suite {suite.name} cannot draw pictures, so it has no measured ceiling")
    if num_images < len(skills):
        raise ValueError(f"number of images is {num_images}; expected at least one per skill, {len(skills)}")
    detector = suite.detector()
    size = DRAWN_SIZE if image_tokenizer is None else image_tokenizer.image_size
    drawn = [suite.picture(number, size) for number in range(num_images)]
    prompts = [metadata for metadata, _ in drawn]
    found = [by_class(detector.detect(image)) for _, image in drawn]
    ceiling = {"drawn": _ceiling(suite, skills, prompts, found)}
    if image_tokenizer is not None:
        decoded = round_trip([image for _, image in drawn], image_tokenizer)
        again = [by_class(detector.detect(image)) for image in decoded]
        ceiling["round_trip"] = _ceiling(suite, skills, prompts, again)
    return {"ceiling": ceiling, "chance": _chance(suite, skills, prompts, found)}


def _ceiling(suite: Suite, skills: list[str], prompts: list[dict], found: list[tuple[dict, dict]]) -> dict:
    verdicts: dict[str, list[bool]] = {skill: [] for skill in skills}
    for metadata, detections in zip(prompts, found, strict=True):
        verdicts[metadata["tag"]].append(judge(metadata, *detections, suite.settings).correct)
    return _bound(len(found), {skill: sum(v) / len(v) for skill, v in verdicts.items()}) | {
        "intervals": {skill: list(wilson(sum(v), len(v))) for skill, v in verdicts.items()}
    }


def _chance(suite: Suite, skills: list[str], prompts: list[dict], found: list[tuple[dict, dict]]) -> dict:
    shares: dict[str, list[float]] = {skill: [] for skill in skills}
    for metadata in suite.prompts:
        # Two captions may ask for the same thing in other words.
        others = [
            d for other, d in zip(prompts, found, strict=True) if other["include"] != metadata["include"]
        ]
        passed = sum(judge(metadata, *detections, suite.settings).correct for detections in others)
        shares[metadata["tag"]].append(passed / max(1, len(others)))
    return _bound(len(found), {skill: float(np.mean(values)) for skill, values in shares.items()})


def _bound(num_images: int, skills: dict[str, float]) -> dict:
    return {"num_images": num_images, "skills": skills, "overall": float(np.mean(list(skills.values())))}


def round_trip(
    images: list[Image.Image], image_tokenizer: Any, *, batch_size: int = 32
) -> Iterator[Image.Image]:
    """Images of the image tokenizer's size, encoded and decoded again."""
    import torch

    from mmtensorar.image_tokenizers import to_images

    device = next(image_tokenizer.parameters()).device
    for start in range(0, len(images), batch_size):
        array = np.stack([np.asarray(image) for image in images[start : start + batch_size]])
        pixels = torch.from_numpy(array).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            yield from to_images(image_tokenizer.decode(image_tokenizer.encode(pixels)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.geneval.ceiling",
        description="Measure what a suite's scores can reach, and chance.",
    )
    parser.add_argument("--suite", default="shapes", help=f"one of {', '.join(suites.SUITES)}")
    parser.add_argument(
        "--image-tokenizer", type=Path, metavar="FOLDER", help="weights of a janus_vq image tokenizer"
    )
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the numbers as JSON")
    options = parser.parse_args(arguments)
    try:
        suite = suites.load(options.suite)
        image_tokenizer = None
        if options.image_tokenizer is not None:
            from mmtensorar import image_tokenizers

            section = image_tokenizers.section({"name": "janus_vq", "path": str(options.image_tokenizer)})
            image_tokenizer = image_tokenizers.load(section)
        bounds = measure(suite, image_tokenizer, num_images=options.num_images)
        if options.out is not None:
            source = None if options.image_tokenizer is None else str(options.image_tokenizer)
            content = {
                "suite": suite.name,
                "detector": suite.detector().name,
                "image_tokenizer": source,
            } | bounds
            write_text(options.out, json.dumps(content, indent=2) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, bound in (bounds["ceiling"] | {"chance": bounds["chance"]}).items():
        skills = "  ".join(f"{skill} {100 * share:.1f}" for skill, share in bound["skills"].items())
        print(
            f"{name.replace('_', ' '):11} {100 * bound['overall']:5.1f} % of {bound['num_images']} pictures   {skills}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
