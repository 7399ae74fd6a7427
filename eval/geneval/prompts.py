"""GenEval's 553 prompts, drawn by its published recipe: 80 classes, seed 43, 100 draws
a task, no duplicates.

They equal the evaluation_metadata.jsonl of github.com/djghosh13/geneval byte for byte
(tests/eval/test_geneval_recorded.py has its SHA-256), so that nothing needs to be
copied or downloaded. The order of the draws is part of the recipe; do not change it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache

import numpy as np

from eval.geneval.score import COLORS, RELATIONS

# COCO's classes in COCO's order, so that an index is a detector's label; three have
# GenEval's own name.
CLASSES = tuple(
    name.strip()
    for name in """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
    fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
    zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball,
    kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup,
    fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut,
    cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote,
    computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase,
    scissors, teddy bear, hair drier, toothbrush""".split(",")
)
SEED, DRAWS = 43, 100
NUMBERS = {2: "two", 3: "three", 4: "four"}


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _sample(tag: str, include: list[dict], words: str, **more: list[dict]) -> dict:
    # The order of the keys is that of the file.
    return {"tag": tag, "include": include, **more, "prompt": f"a photo of {words}"}


def _two(rng: np.random.Generator) -> dict:
    a, b = (CLASSES[i] for i in rng.choice(len(CLASSES), size=2, replace=False))
    return _sample("two_object", [{"class": a, "count": 1}, {"class": b, "count": 1}], f"{_a(a)} and {_a(b)}")


def _counting(rng: np.random.Generator) -> dict:
    name = CLASSES[rng.choice(len(CLASSES))]
    count = int(rng.integers(2, 4, endpoint=True))
    plural = f"{name}es" if name[-1] == "s" else f"{name}s"
    too_many = [{"class": name, "count": count + 1}]
    return _sample(
        "counting", [{"class": name, "count": count}], f"{NUMBERS[count]} {plural}", exclude=too_many
    )


def _colors(rng: np.random.Generator) -> dict:
    # Persons, class 0, are left out.
    name = CLASSES[1 + rng.choice(len(CLASSES) - 1)]
    color = COLORS[rng.choice(len(COLORS))]
    return _sample("colors", [{"class": name, "count": 1, "color": color}], f"{_a(color)} {name}")


def _position(rng: np.random.Generator) -> dict:
    a, b = (CLASSES[i] for i in rng.choice(len(CLASSES), size=2, replace=False))
    relation = RELATIONS[rng.choice(len(RELATIONS))]
    include = [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}]
    return _sample("position", include, f"{_a(a)} {relation} {_a(b)}")


def _color_attr(rng: np.random.Generator) -> dict:
    a, b = (CLASSES[1 + i] for i in rng.choice(len(CLASSES) - 1, size=2, replace=False))
    color_a, color_b = (COLORS[i] for i in rng.choice(len(COLORS), size=2, replace=False))
    include = [{"class": a, "count": 1, "color": color_a}, {"class": b, "count": 1, "color": color_b}]
    return _sample("color_attr", include, f"{_a(color_a)} {a} and {_a(color_b)} {b}")


def _draws() -> Iterator[dict]:
    rng = np.random.default_rng(SEED)
    for index in rng.choice(len(CLASSES), size=len(CLASSES), replace=False):
        name = CLASSES[index]
        yield _sample("single_object", [{"class": name, "count": 1}], _a(name))
    for task in (_two, _counting, _colors, _position, _color_attr):
        for _ in range(DRAWS):
            yield task(rng)


@cache
def prompts() -> tuple[dict, ...]:
    """The 553 specifications, in the official order, as metadata for `score.judge`."""
    return tuple({json.dumps(sample): sample for sample in _draws()}.values())
