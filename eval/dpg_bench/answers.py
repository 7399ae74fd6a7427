"""A cache of a judge's answers, so that an interrupted run never asks twice.

A line is one answer: the SHA-256 of the picture's pixels, the question, the judge and
the answer. The file only grows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from eval.dpg_bench.judges import Judge
from mmtensorar import files

KEYS = ("image_sha256", "question", "judge", "answer")


def image_hash(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


class Cache:
    """The answers in a file.

    A last line that was cut short is removed. Raises ValueError, naming the line, for
    other damage.
    """

    def __init__(self, path: Path):
        self.path = path
        self._answers: dict[tuple[str, str, str], str] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            with path.open("r+b") as file:
                files.end_last_line(file, path, KEYS[0])
        if path.is_file() and path.stat().st_size:
            for where, row in files.read_json_lines(path):
                if not all(isinstance(row.get(key), str) for key in KEYS):
                    raise ValueError(f"{where}: expected {', '.join(KEYS)}")
                self._answers[row["image_sha256"], row["question"], row["judge"]] = row["answer"]

    def ask(self, judge: Judge, image: Image.Image, questions: Sequence[str]) -> list[str]:
        """The judge's answers.

        Only new questions are asked; their answers are written at once.
        """
        picture = image_hash(image)
        new = [q for q in dict.fromkeys(questions) if (picture, q, judge.name) not in self._answers]
        if new:
            answers = judge.ask_all(image, new)
            with self.path.open("a", encoding="utf-8") as file:
                for question, answer in zip(new, answers, strict=True):
                    self._answers[picture, question, judge.name] = answer
                    row = dict(zip(KEYS, (picture, question, judge.name, answer), strict=True))
                    file.write(json.dumps(row) + "\n")
        return [self._answers[picture, question, judge.name] for question in questions]
