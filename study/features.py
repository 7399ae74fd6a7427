"""Features for Frechet distances, and a small classifier where no detector is exact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmtensorar.data.pictures import sample_picture
from mmtensorar.data.shards import Manifest, iterate_shard
from mmtensorar.files import atomic_path
from mmtensorar.image_tokenizers import ImageTokenizer, to_pixels

WIDTH = 32  # of a classifier's features
STEPS, BATCH_SIZE, LR = 800, 64, 2e-3
MAX_SIDE = 32  # pixels; larger pictures are reduced
NUM_SCORED = 256  # pictures at a time


def quarters(image_tokenizer: ImageTokenizer, codes: Tensor) -> np.ndarray:
    """Codes [B, T, 1] -> [B, 4 C] float64: the code vectors, averaged over each quarter
    of the picture.
    """
    down, across = image_tokenizer.grid
    vectors = image_tokenizer.vectors(codes).unflatten(1, (2, down // 2, 2, across // 2))
    return vectors.mean((2, 4)).flatten(1).double().cpu().numpy()


class Classifier(nn.Module):
    """Pixels [B, 3, H, W] in [-1, 1] -> logits [B, classes]; `features` are those
    before the last map.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        widths = (3, 32, 64, 64)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(*pair, 3, stride=1 if number == 0 else 2, padding=1)
            for number, pair in enumerate(zip(widths, widths[1:], strict=False))
        )
        self.hidden = nn.Linear(4 * widths[-1], WIDTH)
        self.output = nn.Linear(WIDTH, num_classes)

    def features(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, WIDTH]."""
        if pixels.shape[-1] > MAX_SIDE:
            pixels = functional.adaptive_avg_pool2d(pixels, MAX_SIDE)
        for convolution in self.convolutions:
            pixels = functional.gelu(convolution(pixels))
        return functional.gelu(self.hidden(functional.adaptive_avg_pool2d(pixels, 2).flatten(1)))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.output(self.features(pixels))

    @torch.no_grad()
    def classes(self, images: Sequence[Image.Image]) -> list[int]:
        """The likeliest class of each picture."""
        return [
            number
            for batch in to_pixels(images).split(NUM_SCORED)
            for number in self(batch).argmax(-1).tolist()
        ]


def read_pictures(folder: Path) -> tuple[Tensor, Tensor]:
    """All pictures of a class-conditional shard set: pixels [N, 3, H, W] in [-1, 1],
    class numbers [N].
    """
    manifest = Manifest.read(folder)
    pictures, classes = [], []
    for shard in manifest.shards:
        for sample in iterate_shard(folder, shard):
            where = f"{folder / shard.name}: sample {sample.key}"
            pictures.append(np.asarray(sample_picture(sample, where, manifest.image_size)))
            classes.append(int(sample.members["txt"]))
    return to_pixels(pictures), torch.tensor(classes)


def train_classifier(path: Path, train: Path, validation: Path, num_classes: int) -> None:
    """Train a classifier and write it, unless path exists.

    Args:
        path: file to write, with the share of validation pictures that it classifies
            correctly.
        train, validation: class-conditional shard sets.
        num_classes: of both sets.
    """
    if path.is_file():
        return
    pixels, classes = read_pictures(train)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = Classifier(num_classes)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(len(pixels), (BATCH_SIZE,), generator=generator)
        loss = functional.cross_entropy(classifier(pixels[chosen]), classes[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    pixels, classes = read_pictures(validation)
    with torch.no_grad():
        likeliest = torch.cat([classifier(batch).argmax(-1) for batch in pixels.split(NUM_SCORED)])
    right = (likeliest == classes).double().mean().item()
    metadata = {"right": f"{right:.5f}", "num_classes": str(num_classes)}
    with atomic_path(path) as temporary:
        save_file(classifier.state_dict(), temporary, metadata)


def load_classifier(path: Path) -> tuple[Classifier, float]:
    """A classifier in eval mode, and the share of validation pictures that it
    classifies correctly.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        classifier = Classifier(int(metadata["num_classes"]))
        classifier.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
    return classifier.eval().requires_grad_(False), float(metadata["right"])
