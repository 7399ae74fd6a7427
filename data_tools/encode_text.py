"""Add text features to shards: a t5.npy member for each sample, float16 [P, C] of P
caption tokens.

    mmtensorar shards encode-text data/mine --text-encoder google/flan-t5-xl
    torchrun --nproc-per-node 8 data_tools/encode_text.py data/mine --text-encoder google/flan-t5-xl

For text-conditional LlamaGen. Training reads the features with
data.text_features=cached, and then needs no text encoder. Encoder, cleaning and number
of tokens must be those of the recipe; training refuses any others. Longer captions are
cut, counted and named. The encoder computes as in training (in bf16 on a GPU, in
float32 on a CPU), because T5's activations overflow in float16; its output fits into
float16.

In training, the loaders hold data.shuffle samples in memory, and at least one per row
of a batch. flan-t5-xl's features take up to 0.5 MB per sample: lower data.shuffle if
memory is short.

Features of another encoder are replaced. The set stays as it was until all shards are
encoded. An interrupted run resumes when the same command is given again, on any number
of ranks.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Python puts a script's own folder here; imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, get_args

import numpy as np
from tqdm import tqdm

from data_tools.argument_types import positive
from data_tools.rewrite_shards import (
    check_set,
    join_ranks,
    pick_device,
    print_once,
    read_set,
    rewrite,
    sum_over_ranks,
)
from data_tools.storage import only_writer
from mmtensorar import ranks
from mmtensorar.captions.cleaning import Cleaning, Emptied
from mmtensorar.cli import Parser, command
from mmtensorar.data import tars
from mmtensorar.data.members import check_features, decode_caption, encode_features
from mmtensorar.data.shards import Sample, Shard, TextFeatures, iterate_shard
from mmtensorar.processes import exit_process
from mmtensorar.words import counted

if TYPE_CHECKING:
    from mmtensorar.captions.encoders import T5Features
    from mmtensorar.model.conditions import Excess

NUM_NAMED = 5  # captions printed when they are cut; more are counted
FIRST_NAMED = ", the first ones named above"


class CutCaptions:
    """Prints the first captions of this process that are cut, and counts them all."""

    def __init__(self):
        self.count = 0

    def add(self, where: str, excess: Excess) -> None:
        """One more. where: its shard and sample."""
        self.count += 1
        if self.count <= NUM_NAMED:
            tqdm.write(f"note: {where}: the caption has {excess}, so it is cut", file=sys.stderr)

    def notes(self) -> list[str]:
        """A sentence on how many there were, if any."""
        if not self.count:
            return []
        were = "was" if self.count == 1 else "were"
        more = FIRST_NAMED if self.count > NUM_NAMED else ""
        captions = counted(self.count, "caption")
        return [f"{captions} encoded now {were} longer than --max-tokens and {were} cut{more}"]


def print_cut(cut: CutCaptions) -> None:
    """Print once how many captions all ranks have cut. All ranks call this."""
    cut.count = sum_over_ranks(cut.count)
    if ranks.is_first():
        for note in cut.notes():
            print(f"note: {note}", file=sys.stderr)


def encode_samples(
    samples: Iterable[Sample],
    name_of: Callable[[Sample], str],
    encoder: T5Features,
    expected: TextFeatures,
    *,
    batch_size: int,
    cut: CutCaptions,
) -> Iterator[Sample]:
    """Samples, each with its features as the last member.

    Args:
        samples: Samples of a shard.
        name_of: Name of a sample, for messages.
        encoder: Encodes the captions.
        expected: The manifest's entry, see features_of.
        batch_size: Captions encoded at a time.
        cut: Receives the captions that are cut.
    """
    from mmtensorar.captions.limits import excesses  # imports torch

    samples = iter(samples)
    while batch := list(islice(samples, batch_size)):
        names = [name_of(sample) for sample in batch]
        captions = [_caption(sample, name) for sample, name in zip(batch, names, strict=True)]
        for number, excess in excesses(encoder, captions):
            cut.add(names[number], excess)
        for name, caption in zip(names, captions, strict=True):
            encoder.emptied.add(name, caption)
        for sample, row, name in zip(batch, encoder.features(captions), names, strict=True):
            with np.errstate(over="ignore"):  # too large becomes infinite, which the check reports
                features = row.numpy().astype(np.float16)
            check_features(features, expected, name)
            others = {member: content for member, content in sample.members.items() if member != "t5.npy"}
            yield Sample(sample.key, others | {"t5.npy": encode_features(features)})


def _caption(sample: Sample, where: str) -> str:
    if "txt" not in sample.members:
        raise ValueError(f"{where}: no txt member")
    return decode_caption(sample.members["txt"], where)


def features_of(encoder: T5Features) -> TextFeatures:
    """The manifest's entry. Raises ValueError when the encoder does not exist."""
    from mmtensorar.captions.encoders import encoder_hash, encoder_width

    return TextFeatures(
        text_encoder=encoder.path,
        weight_hash=encoder_hash(encoder.path, key="--text-encoder"),
        width=encoder_width(encoder.path, key="--text-encoder"),
        max_tokens=encoder.num_slots,
        cleaning=encoder.cleaning,
    )


def encode(folder: Path, encoder: T5Features, *, batch_size: int) -> None:
    """Encode a shard folder. All ranks call this.

    Raises ValueError when the set has class numbers for captions, or is damaged.
    """
    manifest = read_set(folder)
    if manifest.classes is not None:
        classes = len(manifest.classes)
        raise ValueError(
            f"{folder}: its captions are numbers of {counted(classes, 'class')}, which have no text features"
        )
    expected = features_of(encoder)
    name = f"text features of {encoder.path} {expected.weight_hash[:12]}"
    if manifest.text_features == expected:
        print_once(f"reusing {folder}: it has {name}")
    else:
        cut = CutCaptions()

        def encoded(shard: Shard) -> Iterator[Sample]:
            samples = iterate_shard(folder, shard)

            def name_of(sample: Sample) -> str:
                return f"{folder / shard.name}: sample {sample.key}"

            return encode_samples(samples, name_of, encoder, expected, batch_size=batch_size, cut=cut)

        rewrite(folder, manifest, encoded, desc="encoding", unit="captions", text_features=expected)
        print_cut(cut)
        print_once(
            f"{folder}: {counted(manifest.num_samples, 'caption')} with {name}, cleaning {encoder.cleaning}"
        )
        if num_emptied := sum_over_ranks(encoder.emptied.count):
            print_once(emptied_note(num_emptied, encoder.cleaning))
    if ranks.is_first():
        size = sum(stored_bytes(folder / shard.name) for shard in manifest.shards)
        mean = size / manifest.num_samples
        million = f"{mean * 1e6:.3g} bytes ({mean / 1e3:.3g} GB) per million captions"
        print(f"{size} bytes in the shards, {mean:.0f} a caption: {million}")


def emptied_note(num_emptied: int, cleaning: Cleaning) -> str:
    """What to know about captions that were encoded, and of which the cleaning left
    nothing.
    """
    also = "; --caption-cleaning original_or_raw keeps them" if cleaning == "original" else ""
    more = FIRST_NAMED if num_emptied > Emptied.MAX_WARNINGS else ""
    return f"captions encoded now of which cleaning {cleaning} left nothing: {num_emptied}{more}{also}"


def stored_bytes(path: Path) -> int:
    """Bytes of the features in a shard, headers and padding included."""
    with tars.TarReader(path) as file:
        return sum(
            member.end - member.start
            for member in tars.iterate_members(file, path)
            if member.name.endswith(".t5.npy")
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of encoding, apart from the text encoder."""
    parser.add_argument(
        "--caption-cleaning",
        choices=get_args(Cleaning),
        default="original",
        help="as in backbone.caption_cleaning (default: original, LlamaGen's); original_or_raw keeps "
        "captions of which original leaves nothing, such as Chinese and links, as written",
    )
    parser.add_argument(
        "--max-tokens", type=positive, default=120, help="longer captions are cut (default: 120, LlamaGen's)"
    )


@command
def main(arguments: list[str] | None = None) -> int:
    assert __doc__ is not None
    description, _, epilog = __doc__.partition("\n\n")
    parser = Parser(
        prog="python -m data_tools.encode_text",
        description=description,
        epilog=epilog,
        allow_abbrev=False,
    )
    parser.add_argument("shards", type=Path, help="shard folder")
    parser.add_argument(
        "--text-encoder",
        default="google/flan-t5-xl",
        metavar="FOLDER_OR_ID",
        help="a T5, as in backbone.text_encoder (default: google/flan-t5-xl)",
    )
    add_arguments(parser)
    parser.add_argument("--batch-size", type=positive, default=32, help="captions at a time (default: 32)")
    parser.add_argument("--device", help="(default: cuda if there is one, else cpu)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    options = parser.parse_args(arguments)
    check_set(options.shards)
    # Imported after the checks, since torch takes seconds.
    from mmtensorar.captions.encoders import T5Features

    try:
        encoder = T5Features(
            options.text_encoder,
            num_slots=options.max_tokens,
            dim=None,
            cleaning=options.caption_cleaning,
            device=pick_device(options.device),
        )
        join_ranks()
        with only_writer(options.shards, locks=ranks.is_first()):
            encode(options.shards, encoder, batch_size=options.batch_size)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    exit_process(main())
