"""Add image codes to shards: a codes.npy member for each sample, uint16 [A, T, F] of A
crops.

    mmtensorar shards encode-codes data/mine --image-tokenizer deepseek-community/Janus-Pro-7B
    mmtensorar shards encode-codes data/imagenet --name llamagen_vq \\
        --image-tokenizer vq_ds16_c2i.pt --image-size 256 --crops 10
    torchrun --nproc-per-node 8 data_tools/encode_codes.py data/mine \\
        --image-tokenizer deepseek-community/Janus-Pro-7B

Without --crops the pictures are encoded as they are, and must have the image
tokenizer's size. With 2 crops the mirror image is added. With 5 the pictures must be
larger: the crops are the four corners and the centre; with 10 the mirror image of each
is added. Training draws one of the crops each time.

Codes of another image tokenizer are replaced. The set stays as it was until all shards
are encoded. An interrupted run resumes when the same command is given again, on any
number of ranks.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Python puts a script's own folder here; imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from data_tools.argument_types import positive
from data_tools.rewrite_shards import check_set, join_ranks, pick_device, print_once, read_set, rewrite
from data_tools.storage import only_writer
from mmtensorar import ranks
from mmtensorar.checkpoints.options import add_image_tokenizer
from mmtensorar.cli import Parser, command
from mmtensorar.data.members import check_codes, encode_codes
from mmtensorar.data.pictures import sample_picture
from mmtensorar.data.shards import Codes, Sample, Shard, iterate_shard
from mmtensorar.processes import exit_process
from mmtensorar.words import counted

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def crops_of(pixels: Tensor, size: int, num: int) -> Tensor:
    """Cut crops from a picture.

    They are the corners and the centre, or the centre alone, then the mirror images of
    these. The ten are those of LlamaGen's extract_codes_c2i.py
    (FoundationVision/LlamaGen at 5a50452), which uses torchvision's TenCrop.

    Args:
        pixels: [3, H, H].
        size: Side of a crop in pixels.
        num: Number of crops: 1, 2, 5 or 10.

    Returns [num, 3, size, size].
    """
    import torch

    end = pixels.shape[-1] - size
    middle = round(end / 2)
    corners = [(0, 0), (0, end), (end, 0), (end, end)]
    offsets = [*(corners if num in (5, 10) else ()), (middle, middle)]
    images = (pixels, pixels.flip(-1)) if num in (2, 10) else (pixels,)
    return torch.stack(
        [image[:, top : top + size, left : left + size] for image in images for top, left in offsets]
    )


def pictures(
    samples: Iterable[Sample], path: Path, *, image_size: int, batch_size: int, threads: int | None = None
) -> Iterator[tuple[list[Sample], list[Image.Image]]]:
    """Batches of samples with their pictures.

    The next batch is decoded in the background.

    Args:
        samples: Samples of a shard.
        path: The shard's path, for messages.
        image_size: Side in pixels that the pictures must have.
        batch_size: Samples at a time.
        threads: None: one per core. Pillow decodes without holding Python's lock.

    Raises ValueError naming a damaged sample.
    """
    samples = iter(samples)
    with ThreadPoolExecutor(threads) as pool:

        def begin() -> tuple[list[Sample], list[Future]]:
            batch = list(islice(samples, batch_size))
            futures = [
                pool.submit(sample_picture, sample, f"{path}: sample {sample.key}", image_size)
                for sample in batch
            ]
            return batch, futures

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
    """Samples, each with its codes as the last member.

    Args:
        samples: Samples of a shard.
        path: The shard's path, for messages.
        image_tokenizer: An ImageTokenizer on `device`.
        expected: The manifest's entry, see codes_of.
        image_size: Side of the pictures in pixels.
        batch_size: About how many crops are encoded at a time.
        device: Where they are encoded.
    """
    import torch

    from mmtensorar import image_tokenizers

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
    """The manifest's entry.

    Raises ValueError when codes.npy cannot hold the codebook.
    """
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
    folder: Path, image_tokenizer, *, crops: int, precision: str, batch_size: int, device: torch.device
) -> None:
    """Encode a shard folder. All ranks call this.

    Raises ValueError when the set does not fit the image tokenizer, or is damaged.
    """
    manifest = read_set(folder)
    expected = codes_of(image_tokenizer, crops=crops, precision=precision)
    name = f"{expected.image_tokenizer} {expected.weight_hash[:12]}"
    if manifest.codes == expected:
        print_once(f"reusing {folder}: it has codes of {name}")
        return
    check_size(str(folder), manifest.image_size, image_tokenizer.image_size, crops)

    def encoded(shard: Shard) -> Iterator[Sample]:
        return encode_samples(
            iterate_shard(folder, shard),
            folder / shard.name,
            image_tokenizer,
            expected,
            image_size=manifest.image_size,
            batch_size=batch_size,
            device=device,
        )

    rewrite(folder, manifest, encoded, desc="encoding", unit="images", codes=expected)
    several = f"{crops} crops of " if crops > 1 else ""
    print_once(
        f"{folder}: {counted(manifest.num_samples, 'sample')} with codes of {name}, "
        f"{several}{expected.grid[0]}x{expected.grid[1]} tokens"
    )


def check_size(name: str, image_size: int, tokenizer_size: int, crops: int) -> None:
    """Raise ValueError unless the crops can be cut from the pictures.

    Args:
        name: Name of the set, for messages.
        image_size: Side of its pictures in pixels.
        tokenizer_size: Side of the pictures that the image tokenizer takes.
        crops: Number of crops.
    """
    has = f"{name} has images of {image_size} pixels, the image tokenizer takes {tokenizer_size}"
    example = f"make the shards with for example --image-size {int(1.1 * tokenizer_size)}"
    if crops < 5 and image_size != tokenizer_size:
        instead = ", or add --crops 10" if tokenizer_size < image_size <= 1.5 * tokenizer_size else ""
        raise ValueError(f"{has}; make the shards with --image-size {tokenizer_size}{instead}")
    if crops >= 5 and image_size > 2 * tokenizer_size:
        raise ValueError(f"{has}: a crop would be less than a quarter of a picture; {example}")
    if crops >= 5 and image_size <= tokenizer_size:
        raise ValueError(f"{has}: {crops} crops need larger images; {example}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of encoding, apart from the image tokenizer."""
    parser.add_argument(
        "--batch-size", type=positive, default=32, help="images (or crops) encoded at a time (default: 32)"
    )
    parser.add_argument(
        "--crops",
        type=int,
        choices=[1, 2, 5, 10],
        default=1,
        help="codes per image: 1, the image as it is; 2, its mirror image too; 5 or 10, for shards made with "
        "an --image-size of 1.1 times the image tokenizer's, rounded down (281 for 256, 422 for 384)",
    )
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        default="fp32",
        help="bf16 is about twice as fast; with the tiny image tokenizer, 2 %% of the codes differed "
        "(default: fp32)",
    )


@command
def main(arguments: list[str] | None = None) -> int:
    assert __doc__ is not None
    description, _, epilog = __doc__.partition("\n\n")
    parser = Parser(
        prog="python -m data_tools.encode_codes",
        description=description,
        epilog=epilog,
        allow_abbrev=False,
    )
    parser.add_argument("shards", type=Path, help="shard folder")
    add_image_tokenizer(parser)
    add_arguments(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    options = parser.parse_args(arguments)
    check_set(options.shards)
    # Imported after the checks, since torch takes seconds.
    from mmtensorar.checkpoints.recognise import image_tokenizer_from_arguments

    try:
        options.device = str(pick_device(options.device))
        image_tokenizer, device = image_tokenizer_from_arguments(options)
        join_ranks()
        with only_writer(options.shards, locks=ranks.is_first()):
            encode(
                options.shards,
                image_tokenizer,
                crops=options.crops,
                precision=options.precision,
                batch_size=options.batch_size,
                device=device,
            )
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    exit_process(main())
