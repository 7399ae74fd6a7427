"""Suites: prompts in GenEval's form, the detector that looks at their images, and the
scorer's settings.

`geneval`: GenEval's 553 prompts, detected by Mask2Former and CLIP.

`shapes`: the embedded world, with equally many prompts for each of its six skills.
worlds/shapes/prompts.py draws them, and explains how they differ from training
captions.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from eval.geneval.prompts import CLASSES, prompts
from eval.geneval.score import COLORS, RELATIONS, Settings
from mmtensorar.files import read_json
from worlds.shapes.detect import Detector, ShapesDetector
from worlds.shapes.draw import SHAPES, SKILLS
from worlds.shapes.prompts import NUM_PROMPTS, correct_picture, skill_prompts

NUM_IMAGES = 4  # per prompt, as GenEval
MASK2FORMER, CLIP = "facebook/mask2former-swin-small-coco-instance", "openai"  # of suite geneval


@dataclass(frozen=True)
class Suite:
    """Prompts, and what is needed to score pictures of them.

    Args:
        name: of the suite.
        prompts: metadata, grouped by skill.
        classes: the detector's labels.
        detector: returns the detector, loaded at the first call.
        settings: the scorer's.
        picture: (number, size in pixels) -> metadata and a correct picture, where the
            suite can draw them; consecutive numbers cycle through the skills.
    """

    name: str
    prompts: tuple[dict, ...]
    classes: tuple[str, ...]
    detector: Callable[[], Detector]
    settings: Settings
    picture: Callable[[int, int], tuple[dict, Image.Image]] | None = None

    @property
    def skills(self) -> list[str]:
        """The tags of its prompts, in order."""
        return list(dict.fromkeys(prompt["tag"] for prompt in self.prompts))


class DetectorChoice(NamedTuple):
    """Where a learned detector is loaded from, and its device; None is the suite's
    default.
    """

    detector: str | None = None  # folder or Hugging Face id
    clip: str | None = None  # open_clip's tag, or a weights file
    device: str | None = None


DEFAULT_DETECTOR = DetectorChoice()


def add_detector(parser: argparse.ArgumentParser) -> None:
    """Add the options of DetectorChoice, without the device."""
    group = parser.add_argument_group("suite geneval")
    group.add_argument(
        "--detector", metavar="PATH", help=f"Mask2Former, a folder or hub id (default {MASK2FORMER})"
    )
    group.add_argument(
        "--clip", metavar="PATH", help=f"weights of ViT-L/14: open_clip's tag or a file (default {CLIP})"
    )


def load(name: str, num_prompts: int | None = None, choice: DetectorChoice = DEFAULT_DETECTOR) -> Suite:
    """A suite by name.

    Args:
        name: one of SUITES.
        num_prompts: per skill; None: as many as the suite has by default.
        choice: of the detector.

    Raises ValueError for an unknown name or more prompts than the suite has.
    """
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}; known: {', '.join(SUITES)}")
    if num_prompts is not None and num_prompts < 1:
        raise ValueError(f"number of prompts per skill is {num_prompts}; expected 1 or more")
    return SUITES[name](num_prompts, choice)


def shapes(num_prompts: int | None, choice: DetectorChoice) -> Suite:
    chosen = [prompt for skill in SKILLS for prompt in skill_prompts(skill, num_prompts or NUM_PROMPTS)]
    # The detector's scores are overlaps with a template, which it filters itself, and
    # not confidences: GenEval's stricter threshold for counting has no meaning for
    # them.
    settings = Settings(counting_threshold=Settings.threshold)
    return Suite("shapes", tuple(chosen), SHAPES, cache(ShapesDetector), settings, picture=correct_picture)


def geneval(num_prompts: int | None, choice: DetectorChoice) -> Suite:
    by_skill: dict[str, list[dict]] = {}
    for prompt in prompts():
        by_skill.setdefault(prompt["tag"], []).append(prompt)
    fewest = min(map(len, by_skill.values()))
    if num_prompts is not None and num_prompts > fewest:
        raise ValueError(f"{num_prompts} prompts per skill asked for; GenEval has {fewest} for some")

    def detector() -> Detector:
        from eval.geneval import colors, mask2former
        from mmtensorar import devices
        from mmtensorar.checkpoints import released

        device = devices.pick(choice.device)
        released.locate(choice.detector or MASK2FORMER, key="--detector")  # before CLIP is fetched
        classifier = colors.ColorClassifier.load(choice.clip or CLIP, device=device)
        return mask2former.Mask2FormerDetector.load(
            choice.detector or MASK2FORMER, CLASSES, classifier, device
        )

    chosen = [prompt for group in by_skill.values() for prompt in group[:num_prompts]]
    return Suite("geneval", tuple(chosen), CLASSES, cache(detector), Settings())


SUITES: dict[str, Callable[[int | None, DetectorChoice], Suite]] = {"shapes": shapes, "geneval": geneval}


def read_metadata(path: Path, suite: Suite) -> dict:
    """One prompt's metadata.jsonl.

    Raises ValueError naming the file when the suite cannot judge it.
    """
    metadata = read_json(path)
    problem = _problem(metadata, suite)
    if problem:
        raise ValueError(f"{path}: {problem}")
    return metadata


def _problem(metadata: dict, suite: Suite) -> str | None:
    """What makes a value invalid as a specification for this suite's detector; None
    when it is valid.
    """
    for key in ("tag", "prompt"):
        if not isinstance(metadata.get(key), str):
            return f"expected {key} to be text, got {metadata.get(key)!r}"
    for key in ("include", "exclude"):
        clauses = metadata.get(key, [])
        if not isinstance(clauses, list) or (key == "include" and not clauses):
            return f"expected a list of clauses under {key}, got {clauses!r}"
        for index, clause in enumerate(clauses):
            problem = _clause_problem(clause, index, suite)
            if problem:
                return f"{key} {index}: {problem}"
    return None


def _clause_problem(clause: object, index: int, suite: Suite) -> str | None:
    if not isinstance(clause, dict) or clause.get("class") not in suite.classes:
        return f"expected a class that suite {suite.name} detects, got {clause!r}"
    if type(clause.get("count")) is not int or clause["count"] < 1:
        return f"expected count to be a whole number, 1 or more, got {clause.get('count')!r}"
    if clause.get("color", COLORS[0]) not in COLORS:
        return f"expected color to be one of {', '.join(COLORS)}, got {clause['color']!r}"
    if "position" not in clause:
        return None
    match clause["position"]:
        case [relation, target] if relation in RELATIONS and type(target) is int and 0 <= target < index:
            return None
        case position:
            return f"expected position as [relation, number of an earlier clause], got {position!r}"
