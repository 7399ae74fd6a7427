"""Convert released weights to a model folder of this project, and back to their
authors' layout.

    mmtensorar convert SRC DST [--image-tokenizer PATH] [--image-size PIXELS] [--kind KIND]
    mmtensorar convert --original CKPT DST [--base PATH] [--drop-tensorar]

SRC is a file or folder as its authors published it, or a Hugging Face id (of one file:
OWNER/NAME/FILE). Its kind is recognised from its tensors. A backbone becomes a model
folder of window 1, for `generate --ckpt DST` and `train.init_from`; an image tokenizer
becomes a folder for `image_tokenizer.path`. Janus and Open-MAGVIT2 contain their image
tokenizer; LlamaGen's is a separate file. Numbers keep their stored dtype. source.json
has the SHA-256 of every file that was read.

--original writes a trained model of window 1 as its authors' code reads it:
    llamagen       a .pt file, {"model": tensors}, which its sampling scripts read
    open_magvit2   a .ckpt file, {"state_dict": tensors}, with the image tokenizer inside
    janus          a folder in the layout of the Janus that training began from (--base; default: the
                   recipe's backbone.path). The parts that we do not load (vision tower, its aligner and
                   lm_head) are copied from there.
An image tokenizer's folder can be written back too (llamagen_vq, open_magvit2_lfq). Our
folder of an Open-MAGVIT2 tokenizer holds either raw or averaged weights; both are
written under the names of the raw ones.

Neither direction holds more than about one weights file in memory (but PyTorch files
older than version 1.6 are read completely). DST appears when it is complete, and is
never replaced.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mmtensorar.cli import Parser, command
from mmtensorar.recipe import known_names

EXAMPLE = """examples:
  mmtensorar convert deepseek-ai/Janus-Pro-1B models/janus_1b
  mmtensorar convert c2i_B_256.pt models/llamagen_b --image-tokenizer vq_ds16_c2i.pt
  mmtensorar convert --original runs/NAME/model janus_tuned
"""


def parser() -> Parser:
    """The command's options."""
    parser = Parser(
        prog="python -m mmtensorar.convert",
        description="Convert released weights to a model folder of this project, or back.",
        epilog=EXAMPLE,
    )
    add = parser.add_argument
    add("source", metavar="SRC", help="released file, folder or hub id; with --original a model folder")
    add("target", metavar="DST", type=Path, help="what to write; it must not exist")
    kinds = [*known_names("backbone"), *known_names("image_tokenizer")]
    add = parser.add_argument_group("to a model folder").add_argument
    add(
        "--kind",
        choices=kinds,
        help="what SRC is, if its tensors do not show it",
    )
    add(
        "--image-tokenizer", metavar="PATH", help="the backbone's image tokenizer, if SRC has none (LlamaGen)"
    )
    add("--image-size", metavar="PIXELS", type=int, help="pixels a side, if a LlamaGen file does not show it")
    add("--text-tokenizer", metavar="PATH", help="Janus: a folder with tokenizer.json, if SRC has none")
    add("--text-encoder", metavar="PATH", help="LlamaGen, text: its T5 (default google/flan-t5-xl)")
    add("--caption-cleaning", help="LlamaGen, text: original (default), original_or_raw, lower or none")
    add = parser.add_argument_group("back").add_argument
    add("--original", action="store_true", help="write the model folder SRC in its authors' layout")
    add(
        "--base", metavar="PATH", help="Janus: the original, for parts we do not load (default: the recipe's)"
    )
    add(
        "--drop-tensorar",
        action="store_true",
        help="write only the backbone of a model with a window above 1",
    )
    return parser


@command
def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    names = ("kind", "image_tokenizer", "image_size", "text_tokenizer", "text_encoder", "caption_cleaning")
    forward_only = {name: getattr(options, name) for name in names}
    back_only = {"base": options.base, "drop_tensorar": options.drop_tensorar}
    for name, value in (forward_only if options.original else back_only).items():
        if value:
            option, which = name.replace("_", "-"), "with" if options.original else "without"
            raise ValueError(f"--{option} has no use {which} --original")
    if os.path.lexists(options.target):
        raise ValueError(f"DST: {options.target} exists already; give another name, or remove it")
    # Imported after the checks, since torch takes seconds.
    from safetensors import SafetensorError

    from mmtensorar.checkpoints.convert import convert, original

    try:
        if options.original:
            print(original(Path(options.source), options.target, **back_only))
        else:
            print(convert(options.source, options.target, **forward_only))
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    except KeyboardInterrupt:
        print(f"\nstopped; {options.target} was not made", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
