"""Test an image tokenizer alone.

    mmtensorar image-tokenizer roundtrip --tokenizer FOLDER_OR_FILE a.png [b.jpg] --out out/

roundtrip encodes images and decodes their codes: the best that a model on this
tokenizer can show. For each image it writes out/NAME.roundtrip.png, original left and
reconstruction right, and prints the PSNR. It replaces no
file of another image.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from mmtensorar.checkpoints.options import add_image_tokenizer
from mmtensorar.cli import Parser, command, folder_to_write
from mmtensorar.data.pictures import center_square, open_picture
from mmtensorar.files import atomic_path
from mmtensorar.words import counted

if TYPE_CHECKING:
    from mmtensorar.model.protocols import ImageTokenizer

EXAMPLE = "--tokenizer recipes/tiny/weights/base/image_tokenizer a.png --out out/"


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio of two RGB images of one size, in dB over all 8-bit
    values.

    Infinite when they are equal.
    """
    error = np.square(np.asarray(one, np.float64) - np.asarray(other, np.float64)).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def write_roundtrips(
    image_tokenizer: ImageTokenizer, paths: list[Path], out: Path
) -> Iterator[tuple[Path, float]]:
    """Path and PSNR of each comparison written.

    Raises ValueError naming an image that cannot be read, and one whose comparison
    would replace that of another.
    """
    from mmtensorar.image_tokenizers import round_trip

    size = image_tokenizer.image_size
    for path in paths:
        image = open_picture(path)
        if image.size != (size, size):
            print(f"{path}: {image.width}x{image.height}, resized and cut to the centre {size}x{size}")
            image = center_square(image, size)
        reconstruction = next(round_trip(image_tokenizer, [image]))
        both = Image.new("RGB", (2 * size, size))
        both.paste(image, (0, 0))
        both.paste(reconstruction, (size, 0))
        target = out / f"{path.stem}.roundtrip.png"
        if target.exists() and not _shows(target, image):
            raise ValueError(f"{target} exists and shows another image than {path}; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as temporary:
            both.save(temporary, "PNG")
        yield target, psnr(image, reconstruction)


def _shows(target: Path, image: Image.Image) -> bool:
    """Whether an earlier comparison is of this image."""
    try:
        original = open_picture(target).crop((0, 0, *image.size))
    except ValueError:
        return False
    return original.tobytes() == image.tobytes()


def parser() -> Parser:
    """The command's options."""
    parser = Parser(
        prog="python -m mmtensorar.image_tokenizers",
        description="Test an image tokenizer alone.",
        example=f"roundtrip {EXAMPLE}",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    roundtrip = commands.add_parser(
        "roundtrip",
        help="encode and decode images, side by side, with their PSNR",
        example=EXAMPLE,
    )
    roundtrip.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE", help="JPEG, PNG, WEBP, BMP, GIF or TIFF"
    )
    add_image_tokenizer(roundtrip)
    roundtrip.add_argument("--out", type=folder_to_write, default=Path("out"))
    return parser


@command
def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    stems = [path.stem for path in options.images]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise ValueError(
            f"two images are called {twice[0]}; their files in {options.out} would have one name"
        )
    if missing := [path for path in options.images if not path.is_file()]:
        raise ValueError(f"{missing[0]}: no such file")
    # Imported after the checks, since torch takes seconds.
    from mmtensorar.checkpoints.recognise import image_tokenizer_from_arguments

    image_tokenizer, _ = image_tokenizer_from_arguments(options)
    ratios = []
    for path, ratio in write_roundtrips(image_tokenizer, options.images, options.out):
        ratios.append(ratio)
        print(f"{path}: PSNR {ratio:.2f} dB", flush=True)
    if len(ratios) > 1:
        print(f"mean PSNR {sum(ratios) / len(ratios):.2f} dB of {counted(len(ratios), 'image')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
