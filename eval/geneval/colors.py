"""GenEval's colour classifier: CLIP ViT-L/14 on the object alone, everything around it
grey.

The name in open_clip must be ViT-L-14-quickgelu: under ViT-L-14, current versions run
OpenAI's weights with another activation function, and the colours are silently wrong.
Shapes: N objects, D width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as functional
from PIL import Image
from torch import Tensor

from eval.geneval.score import COLORS
from mmtensorar.checkpoints.released import refusal, weight_hash

MODEL = "ViT-L-14-quickgelu"
PROMPTS = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)
AROUND = (0x99, 0x99, 0x99)
BATCH = 64


class ColorClassifier:
    """A CLIP model that names the colour of an object.

    Args:
        model: of open_clip.
        transform: RGB image -> pixels.
        text_tokenizer: texts -> ids.
        name: with a hash of the weights.
        device: where it runs.
    """

    def __init__(self, model, transform: Callable, text_tokenizer: Callable, name: str, device: torch.device):
        self.model = model.to(device).eval().requires_grad_(False)
        self.transform, self.text_tokenizer, self.name, self.device = transform, text_tokenizer, name, device
        self._texts: dict[str, Tensor] = {}

    @classmethod
    def load(cls, pretrained: str, *, device: torch.device) -> ColorClassifier:
        """pretrained: open_clip's tag, or a weights file.

        Raises ValueError when it cannot be loaded.
        """
        try:
            import open_clip
        except ImportError:
            raise ValueError("colours need the package open_clip_torch: pip install -e '.[eval]'") from None
        try:
            model, _, transform = open_clip.create_model_and_transforms(MODEL, pretrained=pretrained)
        except Exception as error:  # any: downloads and unknown files fail in many ways
            reason = refusal(error)
            raise ValueError(f"--clip: {MODEL} with {pretrained} cannot be loaded ({reason})") from None
        name = f"{MODEL} {pretrained} ({weight_hash(model.state_dict())[:12]})"
        return cls(model, transform, open_clip.get_tokenizer(MODEL), name, device)

    @torch.no_grad()
    def classify(
        self, image: Image.Image, objects: Sequence[tuple[str, np.ndarray, Sequence[float]]]
    ) -> list[str]:
        """The colour of each object.

        objects: (class name, mask [H, W] bool, box) in an RGB image.
        """
        colors: list[str] = []
        for start in range(0, len(objects), BATCH):
            batch = objects[start : start + BATCH]
            crops = torch.stack([self.transform(alone(image, mask, box)) for _, mask, box in batch])
            crops = crops.to(self.device)
            with self._autocast():
                features = functional.normalize(self.model.encode_image(crops).float(), dim=-1)  # [N, D]
            texts = torch.stack([self._text(name) for name, _, _ in batch])  # [N, colours, D]
            nearest = torch.einsum("nd,ncd->nc", features, texts).argmax(-1)
            colors += [COLORS[index] for index in nearest.tolist()]
        return colors

    def _text(self, name: str) -> Tensor:
        """[colours, D]: the text embedding of each colour, averaged over the
        prompts.
        """
        if name not in self._texts:
            texts = [prompt.format(color=color, name=name) for color in COLORS for prompt in PROMPTS]
            with self._autocast():
                features = self.model.encode_text(self.text_tokenizer(texts).to(self.device)).float()
            features = functional.normalize(features, dim=-1).unflatten(0, (len(COLORS), len(PROMPTS)))
            self._texts[name] = functional.normalize(features.mean(1), dim=-1)
        return self._texts[name]

    def _autocast(self):
        # The original ran both towers in fp16 on a GPU.
        return torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda")


def alone(image: Image.Image, mask: np.ndarray, box: Sequence[float]) -> Image.Image:
    """The pixels of the mask on grey, cropped to the box."""
    grey = Image.new("RGB", image.size, AROUND)
    return Image.composite(image, grey, Image.fromarray(mask)).crop(tuple(map(int, box)))
