"""Small sets of shards, made on the fly."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from mmtensorar.data.members import encode_codes
from mmtensorar.data.shards import Codes, Manifest, Sample, write_tar

CAPTIONS = (("a red circle", "a blue square"), ("a green circle", "a red square"))


def write_shards(folder: Path, image_tokenizer, captions_of_shards=CAPTIONS) -> None:
    """Two shards of two samples: with batch 4 every step reads the whole set, whatever
    ranks share it.
    """
    folder.mkdir()
    rng = np.random.default_rng(0)
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "JPEG")
    shards = []
    for number, captions in enumerate(captions_of_shards):
        samples = []
        for i, caption in enumerate(captions):
            members = {"jpg": image.getvalue(), "txt": caption.encode(), "json": b"{}"}
            shape, sizes = (1, int(np.prod(image_tokenizer.grid))), image_tokenizer.factor_sizes
            drawn = [rng.integers(size, size=shape, dtype=np.uint16) for size in sizes]
            members["codes.npy"] = encode_codes(np.stack(drawn, axis=-1))
            samples.append(Sample(f"{number}{i}", members))
        shards.append(write_tar(folder / f"{number:05d}.tar", samples))
    codes = Codes(
        image_tokenizer=image_tokenizer.name,
        weight_hash=image_tokenizer.weight_hash,
        grid=tuple(image_tokenizer.grid),
        factor_sizes=tuple(image_tokenizer.factor_sizes),
        crops=1,
    )
    image_size = image_tokenizer.image_size
    Manifest(
        shards=tuple(shards), num_samples=4, image_size=image_size, codes=codes, source="test", seed=0
    ).write(folder)
