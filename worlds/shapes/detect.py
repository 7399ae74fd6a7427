"""Detectors: image -> list of Detection. The shapes world's is exact arithmetic, with no learned part.

How `ShapesDetector` works, step by step:

1. Ground: a plane per channel, least squares over the outermost two pixels (drawn shapes keep off the border).
2. Foreground: pixels more than FOREGROUND away from the ground (Euclidean, 0..255 RGB); 4-connected regions of at
   least MIN_AREA pixels.
3. Colour: the nearest of the ten named colours to the region's median pixel.
4. Coverage: how far each pixel has gone from ground to that colour, in 0..1.
5. Shape: the coverage inside its bounding box, stretched to GRID x GRID, against every shape drawn the same way.
   The score is the best overlap sum(min)/sum(max), times the ratio of the two aspect ratios.
6. Regions under MIN_SCORE, or whose pixels do not agree on a colour, resemble no shape and are dropped.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from worlds.shapes.draw import COLORS, SHAPES, coverage

FOREGROUND = 45.0
MIN_AREA = 30
GRID = 20
MIN_SCORE = 0.70


@dataclass(frozen=True)
class Detection:
    """One found object. box: (x1, y1, x2, y2) in pixels; score in [0, 1]; color is None when not judged."""

    label: str
    box: tuple[float, float, float, float]
    score: float
    color: str | None = None


class Detector:
    """What every suite's detector offers: either of the two methods, the other follows. name: with what tells it apart."""

    name: str

    def detect(self, image: Image.Image) -> list[Detection]:
        """The objects in an RGB image, with their colours."""
        return self.detect_batch([image])[0]

    def detect_batch(
        self, images: Sequence[Image.Image], colored: Sequence[Collection[str]] | None = None
    ) -> list[list[Detection]]:
        """The same of several images. colored: per image the classes whose colour is wanted; None is all of them."""
        return [self.detect(image) for image in images]

    def self_test(self) -> dict | None:
        """What pictures of known content show, for the summary; None when there is nothing to doubt.

        Raises ValueError for an outcome that no working detector has.
        """
        return None


def _stretch(alpha: np.ndarray) -> tuple[np.ndarray, float, tuple[int, int, int, int]]:
    """Cut alpha to the box of its pixels above 1/2 and stretch it; returns [GRID, GRID], width/height and the box."""
    rows, columns = np.where((alpha > 0.5).any(1))[0], np.where((alpha > 0.5).any(0))[0]
    box = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    cut = Image.fromarray(alpha[box[1] : box[3], box[0] : box[2]].astype(np.float32))
    stretched = np.asarray(cut.resize((GRID, GRID), Image.Resampling.BILINEAR))
    return stretched, (box[2] - box[0]) / (box[3] - box[1]), box


@lru_cache(maxsize=1)
def _templates() -> dict[str, tuple[np.ndarray, float]]:
    return {shape: _stretch(coverage(shape, 26.0, 32.0, 32.0, 64))[:2] for shape in SHAPES}


def _regions(mask: np.ndarray) -> list[np.ndarray]:
    """4-connected regions of a boolean mask, each an [N, 2] array of (row, column)."""
    left = mask.copy()
    found = []
    height, width = mask.shape
    for row, column in np.argwhere(mask):
        if not left[row, column]:
            continue
        left[row, column] = False
        region = [(row, column)]
        for r, c in region:  # grows while it is read
            for a, b in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
                if 0 <= a < height and 0 <= b < width and left[a, b]:
                    left[a, b] = False
                    region.append((a, b))
        found.append(np.array(region))
    return found


class ShapesDetector(Detector):
    """The exact detector of the shapes world; see the file's docstring for its rules."""

    name = "shapes-exact"

    def detect(self, image: Image.Image) -> list[Detection]:
        """Find the shapes in an image of any size, best score first."""
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
        height, width = pixels.shape[:2]
        rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
        plane = np.stack([np.ones_like(rows), rows / height, columns / width], -1)
        border = np.ones((height, width), bool)
        border[2:-2, 2:-2] = False
        ground = plane @ np.linalg.lstsq(plane[border], pixels[border], rcond=None)[0]
        mask = np.linalg.norm(pixels - ground, axis=-1) > FOREGROUND
        palette = np.array(list(COLORS.values()), np.float32)
        detections = []
        for region in _regions(mask):
            if len(region) < MIN_AREA:
                continue
            r, c = region.T
            median = np.median(pixels[r, c], axis=0)
            nearest = int(np.linalg.norm(palette - median, axis=1).argmin())
            # Half the pixels and more must be near that colour; a blob of several colours is no object.
            near = np.linalg.norm(pixels[r, c] - palette[nearest], axis=1) < 60
            if near.mean() < 0.5:
                continue
            toward = palette[nearest] - ground[r, c]
            alpha = np.zeros((height, width), np.float32)
            alpha[r, c] = np.clip(
                ((pixels[r, c] - ground[r, c]) * toward).sum(-1) / (toward**2).sum(-1), 0, 1
            )
            if not (alpha > 0.5).any():
                continue
            stretched, aspect, (x1, y1, x2, y2) = _stretch(alpha)
            overlaps = {}
            for shape, (template, template_aspect) in _templates().items():
                overlap = np.minimum(stretched, template).sum() / np.maximum(stretched, template).sum()
                overlaps[shape] = float(overlap * min(aspect / template_aspect, template_aspect / aspect))
            label = max(overlaps, key=overlaps.get)
            if overlaps[label] >= MIN_SCORE:
                box = (float(x1), float(y1), float(x2), float(y2))
                detections.append(Detection(label, box, overlaps[label], list(COLORS)[nearest]))
        return sorted(detections, key=lambda d: -d.score)
