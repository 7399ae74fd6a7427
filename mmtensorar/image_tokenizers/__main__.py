"""Image tokenizers on their own.

    python -m mmtensorar.image_tokenizers roundtrip --tokenizer FOLDER_OR_FILE --name llamagen_vq a.png [b.jpg] --out out/

roundtrip encodes pictures and decodes their codes: what a model on this tokenizer can show at best. Per picture it
writes out/NAME.roundtrip.png, original left and reconstruction right, and prints the PSNR.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from mmtensorar import image_tokenizers
from mmtensorar.data.pictures import center_square, decode_picture
from mmtensorar.image_tokenizers import round_trip


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio of two RGB images of one size, in dB over all 8-bit values; infinite when equal."""
    error = np.square(np.asarray(one, np.float64) - np.asarray(other, np.float64)).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def write_roundtrips(image_tokenizer, paths: list[Path], out: Path) -> Iterator[tuple[Path, float]]:
    """Path of each comparison written, and its PSNR. Raises ValueError naming a picture that cannot be read."""
    size = image_tokenizer.image_size
    for path in paths:
        image = decode_picture(path.read_bytes(), str(path), upright=True)
        if image.size != (size, size):
            print(f"{path}: {image.width}x{image.height}, resized and cut to the centre {size}x{size}")
            image = center_square(image, size)
        made = next(round_trip(image_tokenizer, [image]))
        both = Image.new("RGB", (2 * size, size))
        both.paste(image, (0, 0))
        both.paste(made, (size, 0))
        target = out / f"{path.stem}.roundtrip.png"
        partial = target.with_name(f".{target.name}.partial")
        both.save(partial, "PNG")
        os.replace(partial, target)
        yield target, psnr(image, made)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mmtensorar.image_tokenizers", description="Image tokenizers on their own."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "roundtrip", help="encode and decode pictures, side by side, with their PSNR"
    )
    command.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="JPEG, PNG or WEBP")
    image_tokenizers.add_arguments(command)
    command.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args(arguments)
    try:
        stems = [path.stem for path in options.images]
        if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
            raise ValueError(f"two pictures are called {twice[0]}, and would have one name in {options.out}")
        image_tokenizer, _ = image_tokenizers.from_arguments(options)
        options.out.mkdir(parents=True, exist_ok=True)
        ratios = []
        for path, ratio in write_roundtrips(image_tokenizer, options.images, options.out):
            ratios.append(ratio)
            print(f"{path}: PSNR {ratio:.2f} dB", flush=True)
        if len(ratios) > 1:
            print(f"mean PSNR {sum(ratios) / len(ratios):.2f} dB of {len(ratios)} pictures")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
