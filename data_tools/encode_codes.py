"""Add image codes to shards: a codes.npy member per sample, uint16 [A, T, F] of A crops.

    python data_tools/encode_codes.py data/mine --image-tokenizer deepseek-community/Janus-Pro-7B
    python data_tools/encode_codes.py data/imagenet --name llamagen_vq --image-tokenizer vq_ds16_c2i.pt \\
        --image-size 256 --crops 10

Without --crops the pictures are encoded as they are, and have to be of the image tokenizer's size. With --crops 10
they have to be larger: four corners, the centre, and the mirror image of each, of which training draws one each time.
Codes of another image tokenizer are replaced. The set stays as it was until all shards are encoded; an interrupted run
goes on where it stopped when the same command is given again.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a script, the folder of this file stands first

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from mmtensorar import image_tokenizers
from mmtensorar.shards import (
    Codes,
    Manifest,
    Sample,
    Shard,
    Staging,
    check_codes,
    encode_codes,
    iterate_shard,
    picture,
    rewrite,
)


def ten_crops(pixels: Tensor, size: int) -> Tensor:
    """[3, H, W] -> [10, 3, size, size]: corners and centre, then those of the mirror image.

    As LlamaGen's extract_codes_c2i.py takes them (FoundationVision/LlamaGen at 5a50452), by torchvision's TenCrop.
    """
    end = pixels.shape[-1] - size
    middle = round(end / 2)
    places = [(0, 0), (0, end), (end, 0), (end, end), (middle, middle)]
    return torch.stack(
        [image[:, top : top + size, left : left + size] for image in (pixels, pixels.flip(-1)) for top, left in places]
    )


def encode_shard(
    folder: Path, shard: Shard, image_tokenizer, expected: Codes, *, image_size: int, batch_size: int, device: torch.device
) -> Iterator[Sample]:
    """The samples of one shard, each with its codes as the last member. batch_size: crops at a time, about."""
    path, samples = folder / shard.name, iterate_shard(folder, shard)
    A, size = expected.crops, image_tokenizer.image_size
    with ThreadPoolExecutor() as threads:  # Pillow decodes outside Python's lock
        while batch := list(islice(samples, max(1, batch_size // A))):
            where = [f"{path}: sample {sample.key}" for sample in batch]
            images = threads.map(lambda sample, place: picture(sample, place, image_size), batch, where)
            pixels = image_tokenizers.to_pixels(list(images))
            if A > 1:
                pixels = torch.cat([ten_crops(image, size) for image in pixels])  # [B * A, 3, H, W]
            with torch.inference_mode():
                codes = image_tokenizer.encode(pixels.to(device, memory_format=torch.channels_last)).cpu().numpy()
            rows = codes.astype(np.uint16).reshape(len(batch), A, *codes.shape[1:])  # [B, A, T, F]
            for sample, row, place in zip(batch, rows, where, strict=True):
                check_codes(row, expected, place)
                others = {name: content for name, content in sample.members.items() if name != "codes.npy"}
                yield Sample(sample.key, others | {"codes.npy": encode_codes(row)})


def encode(folder: Path, image_tokenizer, *, crops: int, batch_size: int, device: torch.device) -> None:
    """Encode a shard folder. Raises ValueError when the set does not fit the image tokenizer, or is damaged."""
    Staging.recover(folder)
    manifest = Manifest.read(folder)
    expected = Codes(
        image_tokenizer=image_tokenizer.name,
        weight_hash=image_tokenizer.weight_hash,
        grid=tuple(image_tokenizer.grid),
        factor_sizes=tuple(image_tokenizer.factor_sizes),
        crops=crops,
    )
    if manifest.codes == expected:
        print(f"reusing {folder}: it has codes of {expected.image_tokenizer} {expected.weight_hash[:12]}")
        return
    _check_size(folder, manifest.image_size, image_tokenizer.image_size, crops)
    if max(expected.factor_sizes) > 2**16:
        raise ValueError(f"codebook of {max(expected.factor_sizes)} codes: codes.npy holds at most {2**16}")

    def encoded(shard: Shard) -> Iterator[Sample]:
        size = manifest.image_size
        return encode_shard(
            folder, shard, image_tokenizer, expected, image_size=size, batch_size=batch_size, device=device
        )

    rewrite(folder, manifest, encoded, desc="encoding", unit="images", codes=expected)
    print(
        f"{folder}: {manifest.num_samples} samples have codes of {expected.image_tokenizer} {expected.weight_hash[:12]}, "
        f"{f'{crops} crops of ' if crops > 1 else ''}{expected.grid[0]}x{expected.grid[1]} tokens"
    )


def _check_size(folder: Path, found: int, size: int, crops: int) -> None:
    has = f"{folder} has images of {found} pixels, the image tokenizer takes {size}"
    if crops == 1 and found != size:
        instead = ", or add --crops 10" if found > size else ""
        raise ValueError(f"{has}; make the shards with --image-size {size}{instead}")
    if crops > 1 and found <= size:
        raise ValueError(
            f"{has}: {crops} crops need larger images; make the shards with for example --image-size {int(1.1 * size)}"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="shard folder")
    image_tokenizers.add_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=32, help="images (or crops) encoded at a time")
    parser.add_argument(
        "--crops",
        type=int,
        choices=[1, 10],
        default=1,
        help="codes per image: 1, the image as it is, or 10, for shards made with an --image-size of 1.1 times the "
        "image tokenizer's, rounded down (281 for 256, 422 for 384)",
    )
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {options.batch_size}")
    try:
        image_tokenizer, device = image_tokenizers.from_arguments(options)
        encode(options.shards, image_tokenizer, crops=options.crops, batch_size=options.batch_size, device=device)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
