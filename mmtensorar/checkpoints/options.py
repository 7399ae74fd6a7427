"""The options that name an image tokenizer, without importing torch: mistakes are
reported at once.
"""

from __future__ import annotations

import argparse

from mmtensorar.recipe import known_names


def add_image_tokenizer(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the options that `checkpoints.recognise.image_tokenizer_from_arguments`
    reads.
    """
    parser.add_argument(
        "--image-tokenizer",
        "--tokenizer",
        required=required,
        metavar="PATH",
        help="its weights: folder, file or hub id",
    )
    known = ", ".join(known_names("image_tokenizer"))
    parser.add_argument("--name", help=f"kind of image tokenizer, where its tensors do not show it: {known}")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="pixels a side of its images, where its files do not say (llamagen_vq)",
    )
    parser.add_argument("--device", help="default: cuda if there is a GPU, else cpu")
