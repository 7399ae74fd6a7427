"""Test whether a detector works on this machine. check_detector.py is the command
`self-test`.

Drawn pictures of known content go through detector and colours as a model's pictures
do. The test fails on what no working detector does:

- scores that are not numbers, or all equal;
- different scores for a picture in a batch and alone;
- different scores on the GPU and on the CPU (a broken kernel once gave people scores);
- objects all over an empty picture;
- no object above the threshold in any drawing.

The number of recognised drawings is printed and does not fail the test: whether the
released weights recognise all of these drawings is untested.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from eval.geneval.score import Settings
from worlds.shapes.detect import Detection

SIDE = 512
FINE = 4  # drawings are made this many times larger, then reduced
MAX_IN_EMPTY = 20  # objects above the threshold; GenEval considers 16 of a class
TOLERANCE = 0.02  # of scores, between batches and between devices


class Drawing(NamedTuple):
    """A picture of one object. color: None where the object has several."""

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
    """A picture: two background colours, and on them what paint(pen, side) draws."""
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
    def point(turn: float, radius: float) -> tuple[float, float]:
        angle = 2 * math.pi * turn
        return side * (0.5 + radius * math.sin(angle)), side * (0.45 - radius * math.cos(angle))

    for radius, color in ((0.33, (30, 30, 32)), (0.305, (250, 250, 248))):
        pen.ellipse(
            (side * (0.5 - radius), side * (0.45 - radius), side * (0.5 + radius), side * (0.45 + radius)),
            fill=color,
        )
    font = ImageFont.load_default(0.06 * side)
    for hour in range(1, 13):
        pen.text(point(hour / 12, 0.255), str(hour), (20, 20, 20), font, anchor="mm")
    for turn, length, width in ((10.15 / 12, 0.14, 0.02), (9 / 60, 0.21, 0.013)):
        pen.line([point(turn + 0.5, 0.03), point(turn, length)], fill=(20, 20, 20), width=int(width * side))
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


def run(detector: Any) -> dict:
    """Test a detector, a `mask2former.Mask2FormerDetector`.

    Returns {recognised: drawings whose object and colour it recognises, drawings: how
    many there are, found: label of a drawing -> its best detection}. Raises ValueError
    for an outcome that no working detector has; see the top of the file.
    """
    tests, threshold = drawings(), Settings.threshold
    images = [test.image for test in tests]
    *detected, in_empty = detector.detect_batch([*images, empty()], [[test.label] for test in tests] + [[]])
    alone = detector.detect_batch(images[:1], [[]])[0]
    problems = []
    if (apart := _difference(alone, detected[0])) > TOLERANCE:
        problems.append(f"a picture's scores differ by {apart:.2g} between a batch and alone")
    if (many := sum(item.score > threshold for item in in_empty)) >= MAX_IN_EMPTY:
        problems.append(f"it sees {many} objects in an empty picture")
    best = max((item.score for objects in detected for item in objects), default=0.0)
    if best <= threshold:
        problems.append(f"it sees nothing in any of {len(tests)} drawings, the best score is {best:.2g}")
    if detector.device.type != "cpu" and (apart := _difference_from_cpu(detector, images[0])) > TOLERANCE:
        problems.append(f"scores on {detector.device} differ by {apart:.2g} from those on the CPU")
    if problems:
        raise ValueError(f"the detector {detector.name} fails the self-test: {'; '.join(problems)}")
    best_of, num_recognised = {}, 0
    for test, objects in zip(tests, detected, strict=True):
        first = max(objects, key=lambda item: item.score)
        best_of[test.label] = f"{first.label} {first.score:.2f}"
        same = [item for item in objects if item.label == test.label and item.score > threshold]
        num_recognised += any(test.color in (None, item.color) for item in same)
    return {"recognised": num_recognised, "drawings": len(tests), "found": best_of}


def _difference(one: list[Detection], other: list[Detection]) -> float:
    """The largest difference between the scores of two lists of detections, each sorted
    by score.
    """
    scores = (sorted((item.score for item in objects), reverse=True) for objects in (one, other))
    return max(abs(a - b) for a, b in zip(*scores, strict=True))


def _difference_from_cpu(detector: Any, image: Image.Image) -> float:
    on_device = detector.find([image])[0].scores
    copied = copy.copy(detector)
    copied.model, copied.device = copy.deepcopy(detector.model).cpu(), torch.device("cpu")
    on_cpu = copied.find([image])[0].scores
    return float((on_device.sort().values - on_cpu.sort().values).abs().max())
