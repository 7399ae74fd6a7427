"""GenEval's verdict on one image, and the summary of many. Pure: detections in, numbers out.

The rules are those of GenEval's official scorer (github.com/djghosh13/geneval, commit af4902f), checked against its
verdicts by tests/parity/test_parity.py; this is not its code. Every number is a float32, as there: in double precision a
score of exactly float32(0.3) would pass a threshold of 0.3.

Intervals are 95 % and allow for several images of one prompt being alike:

    skill     Wilson's interval of the share of correct images, with n / d for n. d is the design effect, the variance
              that the prompts' totals show over the variance that n independent images would have. It is estimated
              over all skills together, since one skill has too few prompts, and kept within 1 and the largest number
              of images of a prompt; d is that maximum when no skill has both correct and incorrect images.
    overall   the mean of the skills' shares p_s, with limits mean -/+ sqrt(sum_s (p_s - limit_s)^2) / S, limit_s being
              the skill's own (Zou and Donner 2008, https://doi.org/10.1002/sim.3095). Where a skill is at 0 or 1, the
              usual sum of variances would claim certainty.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import numpy as np

NUM_RESAMPLES = 10_000
Z = 1.959964  # two-sided 95 % of a normal distribution
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Settings:
    """GenEval's own numbers. counting_threshold replaces threshold, for all classes, in prompts tagged counting.

    max_objects: kept per class. max_overlap: boxes whose IoU with a better one reaches it are dropped; 1 keeps all.
    position_threshold: share of the two boxes' summed size that an offset must exceed to count as one.
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
    """Does an image with these detections show what the prompt asks for?

    metadata: one line of GenEval's evaluation_metadata.jsonl. detections: class -> rows [x1, y1, x2, y2, score] in
    any order (among equal scores the later row comes first). colors: class -> the colour of each row.
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
        boxes, found_colors = kept.get(name, _Objects(np.zeros((0, 4), np.float32), []))
        boxes, found_colors = boxes[:count], found_colors[:count]
        problem = None
        if len(boxes) < count:
            problem = f"expected {name}>={count}, found {len(boxes)}"
        elif "color" in clause and found_colors.count(clause["color"]) < count:
            problem = _color_problem(clause, found_colors)
        elif "position" in clause:
            relation, target = clause["position"]
            problem = _position_problem(name, boxes, relation, groups[target], settings)
        if problem:
            reasons.append(problem)
        groups.append(None if problem else boxes)
    for clause in metadata.get("exclude", []):
        name, count = clause["class"], clause["count"]
        found = len(kept[name].boxes) if name in kept else 0
        if found >= count:
            reasons.append(f"expected {name}<{count}, found {found}")
    return Verdict(
        not reasons, "\n".join(reasons), {name: len(objects.boxes) for name, objects in kept.items()}
    )


def by_class(detections: Iterable) -> tuple[dict[str, list[list[float]]], dict[str, list[str | None]]]:
    """Detections with label, box, score and color -> the rows and colours that `judge` takes."""
    rows: dict[str, list[list[float]]] = {}
    colors: dict[str, list[str | None]] = {}
    for item in detections:
        rows.setdefault(item.label, []).append([*item.box, item.score])
        colors.setdefault(item.label, []).append(item.color)
    return rows, colors


def _keep(rows: Sequence, colors: Sequence[str | None], threshold: float, settings: Settings) -> _Objects:
    """The rows of one class that count, best first: above the threshold, then the best few, then suppression."""
    array = np.asarray(rows, np.float32).reshape(-1, 5)
    # Reversed after a stable ascending sort: that is how the official scorer orders equal scores.
    order = np.argsort(array[:, 4], kind="stable")[::-1]
    order = order[array[order, 4] > np.float32(threshold)][: settings.max_objects]
    if settings.max_overlap < 1:
        chosen: list[int] = []
        for index in order:
            if all(_iou(array[index], array[other]) < np.float32(settings.max_overlap) for other in chosen):
                chosen.append(int(index))
        order = np.array(chosen, np.int64)
    return _Objects(array[order, :4], [colors[index] for index in order])


def _iou(a: np.ndarray, b: np.ndarray) -> np.float32:
    """Intersection over union of two boxes, whose last pixels count as inside (hence + 1)."""

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
    """The first object that does not stand in the relation to every target, in words; None when all do."""
    if targets is None:
        return f"no target for {name} to be {relation}"
    for box in boxes:
        for target in targets:
            relations = _relations(box, target, settings.position_threshold)
            if relation not in relations:
                return f"expected {name} {relation} target, found {' and '.join(relations)} target"
    return None


def _relations(box: np.ndarray, target: np.ndarray, threshold: float) -> list[str]:
    """Where box is, seen from target: none, one or two of left of, right of, above, below."""
    half = np.float32(2)
    offset = (box[:2] + box[2:]) / half - (target[:2] + target[2:]) / half
    sizes = (box[2:] - box[:2]) + (target[2:] - target[:2])
    shrunk = np.maximum(np.abs(offset) - np.float32(threshold) * sizes, np.float32(0)) * np.sign(offset)
    if (np.abs(shrunk) < np.float32(1e-3)).all():
        return []
    # By the length before shrinking, as the official scorer does.
    x, y = shrunk / np.linalg.norm(offset)
    found = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return [relation for relation, holds in found.items() if holds]


# ---- many images ---------------------------------------------------------------------------------


def wilson(correct: float, num: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share. num may be fractional: an effective sample size.

    Raises ValueError when num is not above 0 or correct is outside 0..num.
    """
    if not num > 0 or not 0 <= correct <= num:
        raise ValueError(f"wilson needs 0 <= correct <= num and num > 0, got {correct} of {num}")
    share, spread = correct / num, Z * Z / num
    centre = (share + spread / 2) / (1 + spread)
    half = Z * sqrt(share * (1 - share) / num + spread / num / 4) / (1 + spread)
    # At 0 and 1 the limit is exact on paper; rounding must not move it inside.
    return (0.0 if correct == 0 else max(0.0, centre - half)), (
        1.0 if correct == num else min(1.0, centre + half)
    )


def summarize(results: Iterable[tuple[Mapping, bool]]) -> dict:
    """(metadata, correct) per image -> counts, shares and intervals.

    Returns num_images, num_prompts, correct_images, correct_prompts (any image correct; prompts are told apart by
    their whole metadata), prompt_accuracy, skills {tag: {num_images, num_prompts, correct, accuracy, interval}} in order of
    appearance, design_effect, and overall {accuracy, interval}: the mean of the skills, not of the images. Skills and overall
    also have bootstrap, limits by a percentile bootstrap over prompts: close to interval, but of no width at 0 and 1.
    Raises ValueError when there is no image.
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
    drawn = [resampled(verdicts) for verdicts in groups.values()]
    for skill, shares in zip(skills.values(), drawn, strict=True):
        skill["bootstrap"] = _middle(shares)
    every = [verdicts for group in groups.values() for verdicts in group]
    return {
        "num_images": sum(map(len, every)),
        "num_prompts": len(every),
        "correct_images": sum(map(sum, every)),
        "correct_prompts": sum(map(any, every)),
        "prompt_accuracy": sum(map(any, every)) / len(every),
        "skills": skills,
        "design_effect": effect,
        "overall": _overall(skills) | {"bootstrap": _middle(np.mean(drawn, axis=0))},
    }


def design_effect(skills: Sequence[Sequence[Sequence[bool]]]) -> float:
    """skills -> prompts -> verdicts: how many images say as much as one independent image would; see the top."""
    clustered = independent = 0.0
    for prompts in skills:
        num, num_prompts = sum(map(len, prompts)), len(prompts)
        share = sum(map(sum, prompts)) / num
        if num_prompts < 2:
            continue
        squares = sum((sum(verdicts) - len(verdicts) * share) ** 2 for verdicts in prompts)
        clustered += num_prompts / (num_prompts - 1) * squares / num**2
        independent += share * (1 - share) / num
    most = float(max(len(verdicts) for prompts in skills for verdicts in prompts))
    return min(max(clustered / independent, 1.0), most) if independent else most


def resampled(prompts: Sequence[Sequence[bool]], num: int = NUM_RESAMPLES, seed: int = 0) -> np.ndarray:
    """[num] shares of correct images, each of as many prompts drawn with replacement, with all their images."""
    correct, sizes = (np.array([measure(verdicts) for verdicts in prompts]) for measure in (sum, len))
    chosen = np.random.default_rng(seed).integers(len(prompts), size=(num, len(prompts)))
    return correct[chosen].sum(axis=1) / sizes[chosen].sum(axis=1)


def _middle(shares: np.ndarray) -> list[float]:
    """Limits of the middle 95 %."""
    return [float(limit) for limit in np.percentile(shares, (2.5, 97.5))]


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
    shares = [skill["accuracy"] for skill in skills.values()]
    mean = sum(shares) / len(shares)
    low, high = (
        sqrt(sum((skill["accuracy"] - skill["interval"][side]) ** 2 for skill in skills.values()))
        / len(shares)
        for side in (0, 1)
    )
    return {"accuracy": mean, "interval": [max(0.0, mean - low), min(1.0, mean + high)]}
