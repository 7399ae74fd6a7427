"""Does a detector work here at all? python -m eval.geneval self-test [--detector PATH] [--clip PATH] [--out FOLDER]

Drawn pictures of known content go through detector and colours as those of a model do. What no working detector does is
refused: scores that are not numbers or all alike, other scores for a picture in a batch than for it alone, another outcome
on the GPU than on the CPU (a broken kernel once gave people scores), objects all over an empty picture, or none above the
threshold in any. How many drawings are recognised is told, and refused by no one: whether the released weights know
all of these drawings could not be tried where this was written.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from eval.geneval.score import Settings

if TYPE_CHECKING:
    from eval.geneval.mask2former import Mask2FormerDetector

SIDE = 512
FINE = 4  # drawn so many times larger
MOST_IN_EMPTY = 20  # objects above the threshold; GenEval looks at 16 of a class
TOLERANCE = 0.02  # of scores, between batches and between devices


class Drawing(NamedTuple):
    """color: of the object, None where it has several."""

    label: str
    color: str | None
    image: Image.Image


# ---- drawings ------------------------------------------------------------------------------------


def drawings() -> list[Drawing]:
    return [
        Drawing("stop sign", "red", _finished(*_outdoors(), _stop_sign)),
        Drawing("clock", "white", _finished((196, 178, 150), (196, 178, 150), _clock)),
        Drawing("traffic light", None, _finished(*_outdoors(), _traffic_light)),
    ]


def empty() -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), (128, 128, 128))


def _outdoors() -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    return (150, 196, 235), (96, 140, 70)


def _finished(above: tuple, below: tuple, paint) -> Image.Image:
    """Two grounds, one above the other, and what paint draws on a canvas of 1 x 1."""
    large = SIDE * FINE
    image = Image.new("RGB", (large, large), above)
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, int(0.78 * large), large, large), fill=below)
    paint(pen, large)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _polygon(x: float, y: float, radius: float, corners: int, side: int) -> list[tuple[float, float]]:
    turn = math.pi / corners
    return [
        (
            side * (x + radius * math.sin(2 * turn * i + turn)),
            side * (y + radius * math.cos(2 * turn * i + turn)),
        )
        for i in range(corners)
    ]


def _stop_sign(pen: ImageDraw.ImageDraw, side: int) -> None:
    pen.rectangle((0.485 * side, 0.4 * side, 0.515 * side, 0.95 * side), fill=(120, 120, 124))
    pen.polygon(_polygon(0.5, 0.38, 0.30, 8, side), fill=(250, 250, 250))
    pen.polygon(_polygon(0.5, 0.38, 0.28, 8, side), fill=(193, 20, 30))
    pen.text(
        (0.5 * side, 0.38 * side), "STOP", (250, 250, 250), ImageFont.load_default(0.19 * side), anchor="mm"
    )


def _clock(pen: ImageDraw.ImageDraw, side: int) -> None:
    def place(turn: float, radius: float) -> tuple[float, float]:
        angle = 2 * math.pi * turn
        return side * (0.5 + radius * math.sin(angle)), side * (0.45 - radius * math.cos(angle))

    for radius, color in ((0.33, (30, 30, 32)), (0.305, (250, 250, 248))):
        pen.ellipse(
            (side * (0.5 - radius), side * (0.45 - radius), side * (0.5 + radius), side * (0.45 + radius)),
            fill=color,
        )
    font = ImageFont.load_default(0.06 * side)
    for hour in range(1, 13):
        pen.text(place(hour / 12, 0.255), str(hour), (20, 20, 20), font, anchor="mm")
    for turn, length, width in ((10.15 / 12, 0.14, 0.02), (9 / 60, 0.21, 0.013)):
        pen.line([place(turn + 0.5, 0.03), place(turn, length)], fill=(20, 20, 20), width=int(width * side))
    pen.ellipse((0.485 * side, 0.435 * side, 0.515 * side, 0.465 * side), fill=(20, 20, 20))


def _traffic_light(pen: ImageDraw.ImageDraw, side: int) -> None:
    pen.rectangle((0.48 * side, 0.6 * side, 0.52 * side, 0.97 * side), fill=(70, 70, 74))
    pen.rounded_rectangle(
        (0.37 * side, 0.1 * side, 0.63 * side, 0.66 * side), radius=0.04 * side, fill=(34, 34, 36)
    )
    for row, color in enumerate(((225, 30, 30), (90, 74, 20), (16, 70, 34))):
        top = 0.13 + 0.175 * row
        pen.ellipse((0.425 * side, top * side, 0.575 * side, (top + 0.15) * side), fill=color)


# ---- the test ------------------------------------------------------------------------------------


def run(detector: Mask2FormerDetector) -> dict:
    """{recognised, drawings, found}: how many drawings show their object, its colour included, and the best of each.

    Raises ValueError for an outcome that no working detector has; see the top.
    """
    tests, threshold = drawings(), Settings.threshold
    images = [test.image for test in tests]
    found = detector.detect_batch([*images, empty()], [[test.label] for test in tests] + [[]])
    problems = []
    alone = detector.detect_batch(images[:1], [[]])[0]
    apart = max(
        abs(one.score - other.score) for one, other in zip(_ranked(alone), _ranked(found[0]), strict=True)
    )
    if apart > TOLERANCE:
        problems.append(f"a picture's scores differ by {apart:.2g} between a batch and alone")
    if (many := sum(one.score > threshold for one in found[-1])) >= MOST_IN_EMPTY:
        problems.append(f"it sees {many} objects in an empty picture")
    if all(one.score <= threshold for each in found[:-1] for one in each):
        best = max(one.score for each in found[:-1] for one in each)
        problems.append(f"it sees nothing in any of {len(tests)} drawings, the best score is {best:.2g}")
    if detector.device.type != "cpu" and (apart := _apart_from_cpu(detector, images[0])) > TOLERANCE:
        problems.append(f"scores on {detector.device} differ by {apart:.2g} from those on the CPU")
    if problems:
        raise ValueError(f"the detector {detector.name} fails the self-test: {'; '.join(problems)}")
    told, recognised = {}, 0
    for test, each in zip(tests, found[:-1], strict=True):
        best = max(each, key=lambda one: one.score)
        told[test.label] = f"{best.label} {best.score:.2f}"
        same = [one for one in each if one.label == test.label and one.score > threshold]
        recognised += any(test.color in (None, one.color) for one in same)
    return {"recognised": recognised, "drawings": len(tests), "found": told}


def _ranked(detections: list) -> list:
    return sorted(detections, key=lambda one: -one.score)


def _apart_from_cpu(detector: Mask2FormerDetector, image: Image.Image) -> float:
    here = detector.find([image])[0]
    other = copy.copy(detector)
    other.model, other.device = copy.deepcopy(detector.model).cpu(), torch.device("cpu")
    there = other.find([image])[0]
    return float((here.scores.sort().values - there.scores.sort().values).abs().max())


def main(arguments: list[str]) -> int:
    from eval.geneval import suite

    parser = argparse.ArgumentParser(
        prog="python -m eval.geneval self-test", description="Drawn pictures through detector and colours."
    )
    suite.add_detector(parser)
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: a GPU if there is one")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="also write the drawings there")
    options = parser.parse_args(arguments)
    try:
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            for test in drawings():
                test.image.save(options.out / f"{test.label.replace(' ', '_')}.png")
        detector = suite.load(
            "geneval", None, suite.DetectorChoice(options.detector, options.clip, options.device)
        ).detector()
        outcome = run(detector)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{detector.name}: {outcome['recognised']} of {outcome['drawings']} drawings recognised")
    for label, best in outcome["found"].items():
        print(f"  {label:<14} best: {best}")
    return 0
