"""GenEval's detector: transformers' Mask2Former (Swin-S, COCO instances), scored as
mmdet 2.x does.

mmdet does the following, and transformers' own post-processing does not:

- The picture is fitted into 1333 x 800 and padded to a multiple of 32.
- Each of the 100 likeliest (query, class) pairs is an instance, also when several share a query.
- The mask is where the logits are above 0, at the picture's own size.
- The score is the probability of the class times the mean probability inside the mask.
- The box is that of the mask.

Checked against mmdet 2.28.2 itself on random weights: instances, boxes, masks and
scores are equal. Two differences remain: OpenCV rounds differently when it resizes, and
the weights on the hub are from another training run than mmdet's file, which
convert_detector.py converts.
Shapes: Q queries, N instances, H W pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as functional
from PIL import Image
from torch import Tensor

from eval.geneval import self_test
from eval.geneval.colors import ColorClassifier
from mmtensorar.checkpoints.released import locate, weight_hash
from worlds.shapes.detect import Detection, Detector

LONGEST, SHORTEST, MULTIPLE = 1333, 800, 32
NUM_INSTANCES = 100
MEAN, STD, GREY = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), 128.0
MIN_SCORE = 0.3  # colours are classified above it: GenEval ignores other instances


class Instances(NamedTuple):
    labels: Tensor  # [N] int64
    boxes: Tensor  # [N, 4] float32: min x, min y, max x + 1, max y + 1 of the mask; zeros for an empty one
    scores: Tensor  # [N] float32
    masks: Tensor  # [N, H, W] bool


def fitted(width: int, height: int) -> tuple[int, int]:
    """Height and width of a picture fitted into 1333 x 800, either way round."""
    scale = min(LONGEST / max(width, height), SHORTEST / min(width, height))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def prepare(images: Sequence[Image.Image]) -> tuple[Tensor, tuple[int, int]]:
    """B RGB pictures of one size -> the model's pixels [B, 3, H, W], and height and
    width before padding.
    """
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float()
    height, width = fitted(*images[0].size)
    # Not antialiased, as OpenCV's linear filter is not, and rounded as its 8-bit result
    # is.
    pixels = functional.interpolate(pixels, (height, width), mode="bilinear", align_corners=False).round()
    padding = (0, -width % MULTIPLE, 0, -height % MULTIPLE)
    pixels = functional.pad(pixels, padding, value=GREY)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels - mean) / std, (height, width)


@torch.no_grad()
def instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    padded: tuple[int, int],
    resized: tuple[int, int],
    size: tuple[int, int],
) -> Instances:
    """The instances of one picture.

    Args:
        class_logits: [Q, classes + 1].
        mask_logits: [Q, h, w].
        padded: height and width of the model's pixels.
        resized: the same before padding.
        size: height and width of the picture itself.
    """
    num_classes = class_logits.shape[1] - 1
    probabilities = class_logits.float().softmax(-1)[:, :-1].flatten()
    scores, pairs = probabilities.topk(min(NUM_INSTANCES, len(probabilities)), sorted=False)
    labels, queries = pairs % num_classes, pairs // num_classes
    # A query's mask is the same for all its classes, and full-size logits are large:
    # one query at a time.
    masks, boxes = torch.zeros(len(pairs), *size, dtype=torch.bool), torch.zeros(len(pairs), 4)
    means = torch.zeros(len(pairs))
    for query in queries.unique().tolist():
        logits = functional.interpolate(
            mask_logits[None, None, query].float(), padded, mode="bilinear", align_corners=False
        )
        logits = logits[..., : resized[0], : resized[1]]
        logits = functional.interpolate(logits, size, mode="bilinear", align_corners=False)[0, 0].cpu()
        mask, of_query = logits > 0, (queries == query).cpu()
        masks[of_query] = mask
        means[of_query] = (logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6)
        if mask.any():
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            boxes[of_query] = torch.tensor([float(edge) for edge in edges])
    return Instances(labels.cpu(), boxes, scores.cpu() * means, masks)


def nonsense(detected: Instances) -> str | None:
    """Why the instances cannot be right for any picture; None when they are
    plausible.

    A broken kernel gives scores that are not numbers, or the same score for every
    instance.
    """
    scores = detected.scores
    if not scores.isfinite().all():
        return "scores that are not finite"
    if len(scores) > 1 and scores.max() > 0 and (scores == scores[0]).all():
        return f"one score, {scores[0]:.3g}, for all {len(scores)} instances"
    return None


class Mask2FormerDetector(Detector):
    """See the top of the file.

    Args:
        model: transformers' Mask2FormerForUniversalSegmentation.
        name: of the weights; their hash is added.
        classes: the names of its labels.
        colors: classifies the colours of objects.
        device: where it runs.
    """

    def __init__(
        self, model, name: str, classes: Sequence[str], colors: ColorClassifier, device: torch.device
    ):
        if (num_labels := model.config.num_labels) != len(classes):
            raise ValueError(f"{name} has {num_labels} classes; expected the {len(classes)} of COCO")
        self.model = model.to(device).eval().requires_grad_(False)
        self.classes, self.colors, self.device = classes, colors, device
        weights = weight_hash({key: value.cpu() for key, value in model.state_dict().items()})
        self.name = f"{name} ({weights[:12]}), colours {colors.name}"

    @classmethod
    def load(
        cls, path: str, classes: Sequence[str], colors: ColorClassifier, device: torch.device
    ) -> Mask2FormerDetector:
        """path: a folder or Hugging Face id.

        Raises ValueError when it cannot be loaded.
        """
        from transformers import Mask2FormerForUniversalSegmentation

        folder = locate(path, key="--detector")
        try:
            model = Mask2FormerForUniversalSegmentation.from_pretrained(folder, use_safetensors=True)
        # Any exception: transformers expects valid configurations and weights.
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(f"--detector: {path} cannot be loaded as a Mask2Former ({reason})") from None
        return cls(model.float(), path, classes, colors, device)

    def self_test(self) -> dict:
        """See self_test.py."""
        return self_test.run(self)

    @torch.no_grad()
    def find(self, images: Sequence[Image.Image]) -> list[Instances]:
        """Instances of RGB pictures of one size.

        Raises ValueError when the model's output is nonsense.
        """
        pixels, resized = prepare(images)
        try:
            output = self.model(pixel_values=pixels.to(self.device))
        except torch.OutOfMemoryError:
            raise ValueError(
                f"the GPU has too little memory to look at {len(images)} images; try a smaller --batch-size"
            ) from None
        size, padded = images[0].size[::-1], tuple(pixels.shape[-2:])
        pairs = zip(output.class_queries_logits, output.masks_queries_logits, strict=True)
        detected = [instances(*pair, padded, resized, size) for pair in pairs]
        for of_image in detected:
            if problem := nonsense(of_image):
                raise ValueError(
                    f"the detector {self.name} gives {problem}: its weights or this machine compute nonsense"
                )
        return detected

    def detect_batch(
        self, images: Sequence[Image.Image], colored: Sequence[Collection[str]] | None = None
    ) -> list[list[Detection]]:
        """See Detector.

        A colour is classified for the classes in colored, above MIN_SCORE.
        """
        detections: list[list[Detection]] = [[] for _ in images]
        colored = [self.classes] * len(images) if colored is None else colored
        for size in dict.fromkeys(image.size for image in images):
            numbers = [number for number, image in enumerate(images) if image.size == size]
            detected = self.find([images[number] for number in numbers])
            for number, of_image in zip(numbers, detected, strict=True):
                detections[number] = self._named(images[number], of_image, colored[number])
        return detections

    def _named(self, image: Image.Image, detected: Instances, colored: Collection[str]) -> list[Detection]:
        names = [self.classes[label] for label in detected.labels.tolist()]
        boxes, scores = detected.boxes, detected.scores
        wanted = [i for i, name in enumerate(names) if name in colored and scores[i] > MIN_SCORE]
        crops = [(names[i], detected.masks[i].numpy(), boxes[i].tolist()) for i in wanted]
        colors = dict(zip(wanted, self.colors.classify(image, crops), strict=True))
        return [
            Detection(name, tuple(boxes[i].tolist()), float(scores[i]), colors.get(i))
            for i, name in enumerate(names)
        ]
