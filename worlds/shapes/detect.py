"""Detectors: image -> list of Detection.

The detector of the shapes world has no learned part.

`ShapesDetector` works in six steps:

1. Ground: a plane for each channel, by least squares over the outermost two pixels (drawn
   shapes do not touch the border).
2. Foreground: pixels more than FOREGROUND away from the ground (Euclidean, 0..255 RGB), in
   4-connected regions of at least MIN_AREA pixels.
3. Colour: the one of the ten named colours that is nearest to the region's median pixel.
4. Coverage: how far each pixel is on the way from the ground to that colour, in 0..1.
5. Shape: the coverage inside its bounding box, stretched to GRID x GRID, is compared with
   every shape drawn the same way. The score is the best overlap sum(min) / sum(max), times
   the ratio of the two aspect ratios.
6. Regions with a score under MIN_SCORE, or whose pixels do not agree on a colour, are dropped.
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
    """One object in an image.

    box: (x1, y1, x2, y2) in pixels. score: in [0, 1]. color: None when it was not
    judged.
    """

    label: str
    box: tuple[float, float, float, float]
    score: float
    color: str | None = None


class Detector:
    """Base of every suite's detector. A subclass defines `detect` or `detect_batch`.

    name: identifies the detector: two detectors with different results have different
    names.
    """

    name: str

    def detect(self, image: Image.Image) -> list[Detection]:
        """The objects in an RGB image, with their colours."""
        return self.detect_batch([image])[0]

    def detect_batch(
        self, images: Sequence[Image.Image], colored: Sequence[Collection[str]] | None = None
    ) -> list[list[Detection]]:
        """The objects in each of several images.

        colored: for each image the classes whose colour is needed; None is all of them.
        """
        return [self.detect(image) for image in images]

    def self_test(self) -> dict | None:
        """Result on pictures of known content, for the summary; None for an exact
        detector.

        Raises ValueError for a result that no working detector has.
        """
        return None


def _stretch(alpha: np.ndarray) -> tuple[np.ndarray, float, tuple[int, int, int, int]]:
    """Cut alpha [H, W] to the box of its pixels above 1/2, and stretch it.

    Returns the stretched alpha [GRID, GRID], width / height of the box, and the box.
    """
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
    unvisited = mask.copy()
    regions = []
    height, width = mask.shape
    for row, column in np.argwhere(mask):
        if not unvisited[row, column]:
            continue
        unvisited[row, column] = False
        region = [(row, column)]
        for r, c in region:  # the list grows while it is iterated
            for a, b in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
                if 0 <= a < height and 0 <= b < width and unvisited[a, b]:
                    unvisited[a, b] = False
                    region.append((a, b))
        regions.append(np.array(region))
    return regions


def _ground(pixels: np.ndarray) -> np.ndarray:
    """[H, W, 3], a plane for each channel that fits the two outermost pixels on each
    side.
    """
    height, width = pixels.shape[:2]
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    plane = np.stack([np.ones_like(rows), rows / height, columns / width], -1)
    border = np.ones((height, width), bool)
    border[2:-2, 2:-2] = False
    return plane @ np.linalg.lstsq(plane[border], pixels[border], rcond=None)[0]


class ShapesDetector(Detector):
    """The exact detector of the shapes world; the file's docstring has its rules."""

    name = "shapes-exact"

    def detect(self, image: Image.Image) -> list[Detection]:
        """The shapes in an image of any size, best score first."""
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
        ground = _ground(pixels)
        mask = np.linalg.norm(pixels - ground, axis=-1) > FOREGROUND
        detections = [
            self._classify(region, pixels, ground) for region in _regions(mask) if len(region) >= MIN_AREA
        ]
        return sorted(filter(None, detections), key=lambda detection: -detection.score)

    def _classify(self, region: np.ndarray, pixels: np.ndarray, ground: np.ndarray) -> Detection | None:
        """The shape and colour of a region [N, 2], None when it resembles no shape."""
        palette = np.array(list(COLORS.values()), np.float32)
        r, c = region.T
        median = np.median(pixels[r, c], axis=0)
        nearest = int(np.linalg.norm(palette - median, axis=1).argmin())
        # At least half of the pixels must be near that colour: a blob of several
        # colours is no object.
        near = np.linalg.norm(pixels[r, c] - palette[nearest], axis=1) < 60
        if near.mean() < 0.5:
            return None
        toward = palette[nearest] - ground[r, c]
        alpha = np.zeros(pixels.shape[:2], np.float32)
        alpha[r, c] = np.clip(((pixels[r, c] - ground[r, c]) * toward).sum(-1) / (toward**2).sum(-1), 0, 1)
        if not (alpha > 0.5).any():
            return None
        stretched, aspect, (x1, y1, x2, y2) = _stretch(alpha)
        overlaps = {}
        for shape, (template, template_aspect) in _templates().items():
            overlap = np.minimum(stretched, template).sum() / np.maximum(stretched, template).sum()
            overlaps[shape] = float(overlap * min(aspect / template_aspect, template_aspect / aspect))
        label = max(overlaps, key=lambda shape: overlaps[shape])
        if overlaps[label] < MIN_SCORE:
            return None
        box = (float(x1), float(y1), float(x2), float(y2))
        return Detection(label, box, overlaps[label], list(COLORS)[nearest])
