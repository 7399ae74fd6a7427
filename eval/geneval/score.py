"""GenEval's verdict on one image, and the summary of many.

Pure: detections in, numbers out.

The rules are those of GenEval's official scorer (github.com/djghosh13/geneval, commit
af4902f), checked against its verdicts by tests/parity/test_parity.py; the code is our
own. Every number is a float32, as in the original: in double precision a score of
exactly float32(0.3) would pass a threshold of 0.3.

Intervals are 95 % (eval/intervals.py) and allow for several images of one prompt being
alike:

    skill     Wilson's interval of the share of correct images, with n / d instead of n images,
              d being the design effect
    overall   the mean of the skills' shares, with limits from the skills' own limits
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from eval.intervals import cluster_bootstrap, design_effect, mean_of_shares, percentiles, wilson

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Settings:
    """GenEval's own numbers.

    Args:
        threshold: score above which an object counts.
        counting_threshold: replaces threshold, for all classes, in prompts tagged
            counting.
        max_objects: kept per class.
        max_overlap: a box whose IoU with a better one reaches this is dropped; 1 keeps
            all.
        position_threshold: share of the two boxes' summed size that an offset must
            exceed.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_threshold: float = 0.1


class Verdict(NamedTuple):
    correct: bool
    reason: str  # one line per unmet demand, empty when correct
    kept: dict[str, int]  # class -> detections left after filtering, classes with none left out


class _Objects(NamedTuple):
    boxes: np.ndarray  # [N, 4] float32, x1 y1 x2 y2, best score first
    colors: list[str | None]


# ---- one image -----------------------------------------------------------------------------------


def judge(
    metadata: Mapping,
    detections: Mapping[str, Sequence[Sequence[float]]],
    colors: Mapping[str, Sequence[str | None]],
    settings: Settings = Settings(),
) -> Verdict:
    """Whether an image with these detections shows what the prompt asks for.

    Args:
        metadata: one line of GenEval's evaluation_metadata.jsonl.
        detections: class -> rows [x1, y1, x2, y2, score] in any order. Among equal
            scores the later row comes first.
        colors: class -> the colour of each row.
        settings: GenEval's numbers.
    """
    threshold = settings.counting_threshold if metadata["tag"] == "counting" else settings.threshold
    kept = {
        name: objects
        for name, rows in detections.items()
        if len((objects := _keep(rows, colors.get(name, [None] * len(rows)), threshold, settings)).boxes)
    }
    reasons: list[str] = []
    groups: list[np.ndarray | None] = []  # per clause its boxes, None when it failed
    for clause in metadata.get("include", []):
        name, count = clause["class"], clause["count"]
        boxes, kept_colors = kept.get(name, _Objects(np.zeros((0, 4), np.float32), []))
        boxes, kept_colors = boxes[:count], kept_colors[:count]
        problem = None
        if len(boxes) < count:
            problem = f"expected {name}>={count}, found {len(boxes)}"
        elif "color" in clause and kept_colors.count(clause["color"]) < count:
            problem = _color_problem(clause, kept_colors)
        elif "position" in clause:
            relation, target = clause["position"]
            problem = _position_problem(name, boxes, relation, groups[target], settings)
        if problem:
            reasons.append(problem)
        groups.append(None if problem else boxes)
    for clause in metadata.get("exclude", []):
        name, count = clause["class"], clause["count"]
        num_kept = len(kept[name].boxes) if name in kept else 0
        if num_kept >= count:
            reasons.append(f"expected {name}<{count}, found {num_kept}")
    return Verdict(
        not reasons, "\n".join(reasons), {name: len(objects.boxes) for name, objects in kept.items()}
    )


def by_class(detections: Iterable) -> tuple[dict[str, list[list[float]]], dict[str, list[str | None]]]:
    """Detections with label, box, score and color -> the rows and colours that `judge`
    takes.
    """
    rows: dict[str, list[list[float]]] = {}
    colors: dict[str, list[str | None]] = {}
    for item in detections:
        rows.setdefault(item.label, []).append([*item.box, item.score])
        colors.setdefault(item.label, []).append(item.color)
    return rows, colors


def _keep(rows: Sequence, colors: Sequence[str | None], threshold: float, settings: Settings) -> _Objects:
    """The rows of one class that count, best first: above the threshold, the best few,
    without overlaps.
    """
    array = np.asarray(rows, np.float32).reshape(-1, 5)
    # Reversed after a stable ascending sort: that is how the official scorer orders
    # equal scores.
    best_first = np.argsort(array[:, 4], kind="stable")[::-1]
    best_first = best_first[array[best_first, 4] > np.float32(threshold)][: settings.max_objects]
    if settings.max_overlap < 1:
        chosen: list[int] = []
        for index in best_first:
            if all(_iou(array[index], array[other]) < np.float32(settings.max_overlap) for other in chosen):
                chosen.append(int(index))
        best_first = np.array(chosen, np.int64)
    return _Objects(array[best_first, :4], [colors[index] for index in best_first])


def _iou(a: np.ndarray, b: np.ndarray) -> np.float32:
    """Intersection over union of two boxes, whose last pixels count as inside
    (hence + 1).
    """

    def area(box: np.ndarray) -> np.float32:
        width, height = np.maximum(box[2:4] - box[:2] + np.float32(1), np.float32(0))
        return width * height

    shared = area(np.concatenate([np.maximum(a[:2], b[:2]), np.minimum(a[2:4], b[2:4])]))
    total = area(a) + area(b) - shared
    return shared / total if total else np.float32(0)


def _color_problem(clause: Mapping, colors: Sequence[str | None]) -> str:
    wanted, count = clause["color"], clause["count"]
    others = ", ".join(
        f"{colors.count(color)} {color}" for color in COLORS if color != wanted and color in colors
    )
    return (
        f"expected {wanted} {clause['class']}>={count}, found {colors.count(wanted)} {wanted}; and {others}"
    )


def _position_problem(
    name: str, boxes: np.ndarray, relation: str, targets: np.ndarray | None, settings: Settings
) -> str | None:
    """A sentence for the first object without the relation to every target; None when
    all have it.
    """
    if targets is None:
        return f"no target for {name} to be {relation}"
    for box in boxes:
        for target in targets:
            relations = _relations(box, target, settings.position_threshold)
            if relation not in relations:
                return f"expected {name} {relation} target, found {' and '.join(relations)} target"
    return None


def _relations(box: np.ndarray, target: np.ndarray, threshold: float) -> list[str]:
    """Where box is, seen from target: none, one or two of RELATIONS."""
    half = np.float32(2)
    offset = (box[:2] + box[2:]) / half - (target[:2] + target[2:]) / half
    sizes = (box[2:] - box[:2]) + (target[2:] - target[:2])
    shrunk = np.maximum(np.abs(offset) - np.float32(threshold) * sizes, np.float32(0)) * np.sign(offset)
    if (np.abs(shrunk) < np.float32(1e-3)).all():
        return []
    # By the length before shrinking, as the official scorer does.
    x, y = shrunk / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return [relation for relation in holds if holds[relation]]


# ---- many images ---------------------------------------------------------------------------------


def summarize(results: Iterable[tuple[Mapping, bool]]) -> dict:
    """Counts, shares and intervals of (metadata, correct) of each image.

    Returns
        num_images, num_prompts, correct_images, prompt_accuracy;
        correct_prompts: prompts with any correct image; prompts are compared by their whole metadata;
        skills: tag -> {num_images, num_prompts, correct, accuracy, interval, bootstrap}, in order
            of appearance;
        design_effect;
        overall: {accuracy, interval, bootstrap}, the mean of the skills, not of the images.

    bootstrap: limits by a percentile bootstrap over prompts, close to interval, but
    with no width at 0 and 1. Raises ValueError when there is no image.
    """
    prompts: dict[str, dict[str, list[bool]]] = {}  # skill -> prompt -> verdicts
    for metadata, correct in results:
        key = json.dumps(metadata, sort_keys=True)
        prompts.setdefault(metadata["tag"], {}).setdefault(key, []).append(bool(correct))
    if not prompts:
        raise ValueError("no images to summarize")
    groups = {skill: list(by_prompt.values()) for skill, by_prompt in prompts.items()}
    effect = design_effect(list(groups.values()))
    skills = {skill: _skill(verdicts, effect) for skill, verdicts in groups.items()}
    resamples = [cluster_bootstrap(verdicts) for verdicts in groups.values()]
    for skill, shares in zip(skills.values(), resamples, strict=True):
        skill["bootstrap"] = percentiles(shares)
    every = [verdicts for group in groups.values() for verdicts in group]
    return {
        "num_images": sum(map(len, every)),
        "num_prompts": len(every),
        "correct_images": sum(map(sum, every)),
        "correct_prompts": sum(map(any, every)),
        "prompt_accuracy": sum(map(any, every)) / len(every),
        "skills": skills,
        "design_effect": effect,
        "overall": _overall(skills) | {"bootstrap": percentiles(np.mean(resamples, axis=0))},
    }


def _skill(prompts: Sequence[Sequence[bool]], effect: float) -> dict:
    num, correct = sum(map(len, prompts)), sum(map(sum, prompts))
    return {
        "num_images": num,
        "num_prompts": len(prompts),
        "correct": correct,
        "accuracy": correct / num,
        "interval": list(wilson(correct / effect, num / effect)),
    }


def _overall(skills: Mapping[str, Mapping]) -> dict:
    shares, limits = ([skill[key] for skill in skills.values()] for key in ("accuracy", "interval"))
    mean, low, high = mean_of_shares(shares, limits)
    return {"accuracy": mean, "interval": [low, high]}
