"""Add image codes to shards: a codes.npy member per sample, uint16 [A, T, F] of A crops.

    python data_tools/encode_codes.py data/mine --image-tokenizer deepseek-community/Janus-Pro-7B
    python data_tools/encode_codes.py data/imagenet --name llamagen_vq --image-tokenizer vq_ds16_c2i.pt \\
        --image-size 256 --crops 10
    torchrun --nproc-per-node 8 data_tools/encode_codes.py data/mine --image-tokenizer deepseek-community/Janus-Pro-7B

Without --crops the pictures are encoded as they are, and have to be of the image tokenizer's size. With 2 crops the mirror image
comes with each. With 5 they have to be larger: four corners and the centre; with 10 the mirror image of each of these too. Of the
crops training draws one each time.
Codes of another image tokenizer are replaced. The set stays as it was until all shards are encoded; an interrupted run
goes on where it stopped when the same command is given again, on any number of ranks.
"""

import sys
from pathlib import Path

sys.path[0] = str(
    Path(__file__).resolve().parents[1]
)  # run as a script, the folder of this file stands first

import argparse
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_tools.rewrite_shards import (
    Ranks,
    device,
    read_set,
    rewrite,
)
from mmtensorar import image_tokenizers
from mmtensorar.checkpoints.recognise import image_tokenizer_from_arguments
from mmtensorar.data.shards import (
    Codes,
    Sample,
    Shard,
    check_codes,
    encode_codes,
    iterate_shard,
    picture,
)
from mmtensorar.processes import leave


def crops_of(pixels: Tensor, size: int, num: int) -> Tensor:
    """[3, H, H] -> [num, 3, size, size]: corners and centre, or the centre alone, and then the mirror images of these.

    num is 1, 2, 5 or 10. The ten are as LlamaGen's extract_codes_c2i.py takes them (FoundationVision/LlamaGen at 5a50452),
    by torchvision's TenCrop.
    """
    end = pixels.shape[-1] - size
    middle = round(end / 2)
    corners = [(0, 0), (0, end), (end, 0), (end, end)]
    places = [*(corners if num in (5, 10) else ()), (middle, middle)]
    images = (pixels, pixels.flip(-1)) if num in (2, 10) else (pixels,)
    return torch.stack(
        [image[:, top : top + size, left : left + size] for image in images for top, left in places]
    )


def pictures(
    samples: Iterable[Sample], path: Path, *, image_size: int, batch_size: int, threads: int | None = None
) -> Iterator[tuple[list[Sample], list[Image.Image]]]:
    """Samples of the shard at path in batches, with their pictures; those of the next batch are decoded meanwhile.

    threads: None is one a core, for Pillow decodes outside Python's lock. Raises ValueError naming a sample that is damaged.
    """
    samples = iter(samples)
    with ThreadPoolExecutor(threads) as pool:

        def begin() -> tuple[list[Sample], list[Future]]:
            batch = list(islice(samples, batch_size))
            where = [f"{path}: sample {sample.key}" for sample in batch]
            return batch, [pool.submit(picture, *each, image_size) for each in zip(batch, where, strict=True)]

        ahead = begin()
        while ahead[0]:
            (batch, waiting), ahead = ahead, begin()
            yield batch, [future.result() for future in waiting]


def encode_samples(
    samples: Iterable[Sample],
    path: Path,
    image_tokenizer,
    expected: Codes,
    *,
    image_size: int,
    batch_size: int,
    device: torch.device,
) -> Iterator[Sample]:
    """Samples of the shard at path, each with its codes as the last member. batch_size: crops at a time, about."""
    A, size = expected.crops, image_tokenizer.image_size
    precision = torch.autocast(device.type, torch.bfloat16, enabled=expected.precision == "bf16")
    for batch, images in pictures(samples, path, image_size=image_size, batch_size=max(1, batch_size // A)):
        pixels = image_tokenizers.to_pixels(images)
        if A > 1:
            pixels = torch.cat([crops_of(image, size, A) for image in pixels])  # [B * A, 3, H, W]
        with torch.inference_mode(), precision:
            codes = image_tokenizer.encode(pixels.to(device, memory_format=torch.channels_last)).cpu().numpy()
        rows = codes.astype(np.uint16).reshape(len(batch), A, *codes.shape[1:])  # [B, A, T, F]
        for sample, row in zip(batch, rows, strict=True):
            check_codes(row, expected, f"{path}: sample {sample.key}")
            others = {name: content for name, content in sample.members.items() if name != "codes.npy"}
            yield Sample(sample.key, others | {"codes.npy": encode_codes(row)})


def codes_of(image_tokenizer, *, crops: int, precision: str) -> Codes:
    """What the manifest will say. Raises ValueError when codes.npy cannot hold the codebook."""
    if max(image_tokenizer.factor_sizes) > 2**16:
        raise ValueError(
            f"codebook of {max(image_tokenizer.factor_sizes)} codes: codes.npy holds at most {2**16}"
        )
    return Codes(
        image_tokenizer=image_tokenizer.name,
        weight_hash=image_tokenizer.weight_hash,
        grid=tuple(image_tokenizer.grid),
        factor_sizes=tuple(image_tokenizer.factor_sizes),
        crops=crops,
        precision=precision,
    )


def encode(
    folder: Path,
    image_tokenizer,
    ranks: Ranks,
    *,
    crops: int,
    precision: str,
    batch_size: int,
    device: torch.device,
) -> None:
    """Encode a shard folder. Raises ValueError when the set does not fit the image tokenizer, or is damaged."""
    manifest = read_set(folder, ranks)
    expected = codes_of(image_tokenizer, crops=crops, precision=precision)
    if manifest.codes == expected:
        ranks.say(f"reusing {folder}: it has codes of {expected.image_tokenizer} {expected.weight_hash[:12]}")
        return
    check_size(str(folder), manifest.image_size, image_tokenizer.image_size, crops)

    def encoded(shard: Shard) -> Iterator[Sample]:
        settings = dict(image_size=manifest.image_size, batch_size=batch_size, device=device)
        return encode_samples(
            iterate_shard(folder, shard), folder / shard.name, image_tokenizer, expected, **settings
        )

    rewrite(folder, manifest, encoded, ranks, desc="encoding", unit="images", codes=expected)
    ranks.say(
        f"{folder}: {manifest.num_samples} samples have codes of {expected.image_tokenizer} {expected.weight_hash[:12]}, "
        f"{f'{crops} crops of ' if crops > 1 else ''}{expected.grid[0]}x{expected.grid[1]} tokens"
    )


def check_size(name: str, found: int, size: int, crops: int) -> None:
    """Raise ValueError unless so many crops can be cut from pictures of `found` pixels. name: of the set."""
    has = f"{name} has images of {found} pixels, the image tokenizer takes {size}"
    if crops < 5 and found != size:
        instead = ", or add --crops 10" if size < found <= 1.5 * size else ""
        raise ValueError(f"{has}; make the shards with --image-size {size}{instead}")
    if crops >= 5 and found > 2 * size:
        raise ValueError(
            f"{has}: a crop would be less than a quarter of a picture; make the shards with for example --image-size {int(1.1 * size)}"
        )
    if crops >= 5 and found <= size:
        raise ValueError(
            f"{has}: {crops} crops need larger images; make the shards with for example --image-size {int(1.1 * size)}"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How pictures are encoded, once there is an image tokenizer."""
    parser.add_argument(
        "--batch-size", type=int, default=32, help="images (or crops) encoded at a time (default: 32)"
    )
    parser.add_argument(
        "--crops",
        type=int,
        choices=[1, 2, 5, 10],
        default=1,
        help="codes per image: 1, the image as it is; 2, its mirror image too; 5 or 10, for shards made with an --image-size of "
        "1.1 times the image tokenizer's, rounded down (281 for 256, 422 for 384)",
    )
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        default="fp32",
        help="bf16 is about twice as fast, and gave other codes for 2 %% of the tokens of the tiny image tokenizer (default: fp32)",
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("shards", type=Path, help="shard folder")
    image_tokenizers.add_arguments(parser)
    add_arguments(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {options.batch_size}")
    try:
        options.device = str(device(options.device))
        image_tokenizer, place = image_tokenizer_from_arguments(options)
        settings = dict(
            crops=options.crops, precision=options.precision, batch_size=options.batch_size, device=place
        )
        encode(options.shards, image_tokenizer, Ranks(), **settings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    leave(main())
