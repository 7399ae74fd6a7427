"""Add text features to shards: a t5.npy member per sample, float16 [P, C] of the caption's P tokens.

    python data_tools/encode_text.py data/mine --text-encoder google/flan-t5-xl
    torchrun --nproc-per-node 8 data_tools/encode_text.py data/mine --text-encoder google/flan-t5-xl

For text-conditional LlamaGen; training reads them with data.text_features=cached, and then needs no text encoder.
Encoder, cleaning and number of tokens are those of the recipe, or training refuses them. The encoder runs as in
training (on a GPU in bf16, on a CPU in float32), for T5's activations overflow in float16; what it returns fits.
The loaders hold data.shuffle samples, and at least one a row, with up to 0.5 MB of flan-t5-xl's features each: lower it where
memory is short.
Features of another encoder are replaced. The set stays as it was until all shards are encoded; an interrupted run goes
on where it stopped when the same command is given again, on any number of ranks.
"""

import sys
from pathlib import Path

sys.path[0] = str(
    Path(__file__).resolve().parents[1]
)  # run as a script, the folder of this file stands first

import argparse
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import get_args

import numpy as np

from data_tools.rewrite_shards import (
    Ranks,
    device,
    read_set,
    rewrite,
)
from mmtensorar.captions.encoders import (
    Cleaning,
    T5Features,
    encoder_hash,
    encoder_width,
)
from mmtensorar.data import tars
from mmtensorar.data.shards import (
    Sample,
    Shard,
    TextFeatures,
    check_features,
    decode_caption,
    encode_features,
    iterate_shard,
)
from mmtensorar.processes import exit_process


def encode_samples(
    samples: Iterable[Sample], path: Path, encoder: T5Features, expected: TextFeatures, *, batch_size: int
) -> Iterator[Sample]:
    """Samples of the shard at path, each with its features as the last member."""
    samples = iter(samples)
    while batch := list(islice(samples, batch_size)):
        where = [f"{path}: sample {sample.key}" for sample in batch]
        for sample, place in zip(batch, where, strict=True):
            if "txt" not in sample.members:
                raise ValueError(f"{place}: no txt member")
        captions = [
            decode_caption(sample.members["txt"], place) for sample, place in zip(batch, where, strict=True)
        ]
        for sample, row, place in zip(batch, encoder.features(captions), where, strict=True):
            with np.errstate(over="ignore"):  # too large is infinite, which the check names
                features = row.numpy().astype(np.float16)
            check_features(features, expected, place)
            others = {name: content for name, content in sample.members.items() if name != "t5.npy"}
            yield Sample(sample.key, others | {"t5.npy": encode_features(features)})


def features_of(encoder: T5Features) -> TextFeatures:
    """What the manifest will say. Raises ValueError when there is no such encoder."""
    return TextFeatures(
        text_encoder=encoder.path,
        weight_hash=encoder_hash(encoder.path, key="--text-encoder"),
        width=encoder_width(encoder.path, key="--text-encoder"),
        max_tokens=encoder.num_slots,
        cleaning=encoder.cleaning,
    )


def encode(folder: Path, encoder: T5Features, ranks: Ranks, *, batch_size: int) -> None:
    """Encode a shard folder. Raises ValueError when the set has no captions, or is damaged."""
    manifest = read_set(folder, ranks)
    if manifest.classes is not None:
        classes = len(manifest.classes)
        raise ValueError(
            f"{folder}: its captions are numbers of {classes} classes, which have no text features"
        )
    expected = features_of(encoder)
    what = f"text features of {encoder.path} {expected.weight_hash[:12]}"
    if manifest.text_features == expected:
        ranks.say(f"reusing {folder}: it has {what}")
    else:

        def change(shard: Shard) -> Iterator[Sample]:
            samples = iterate_shard(folder, shard)
            return encode_samples(samples, folder / shard.name, encoder, expected, batch_size=batch_size)

        rewrite(folder, manifest, change, ranks, desc="encoding", unit="captions", text_features=expected)
        ranks.say(f"{folder}: {manifest.num_samples} captions have {what}, cleaning {encoder.cleaning}")
    if not ranks.first:
        return
    size = sum(stored_bytes(folder / shard.name) for shard in manifest.shards)
    each = size / manifest.num_samples
    million = f"{each * 1e6:.3g} bytes ({each / 1e3:.3g} GB) per million captions"
    print(f"{size} bytes in the shards, {each:.0f} a caption: {million}")


def stored_bytes(path: Path) -> int:
    """Bytes that the features take in a shard, headers and padding included."""
    with tars.opened(path) as file:
        return sum(
            member.end - place for place, member in tars.placed(file, path) if member.name.endswith(".t5.npy")
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How captions are encoded, once there is a text encoder."""
    parser.add_argument(
        "--caption-cleaning",
        choices=get_args(Cleaning),
        default="original",
        help="as in backbone.caption_cleaning (default: original, LlamaGen's)",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=120, help="longer captions are cut (default: 120, LlamaGen's)"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("shards", type=Path, help="shard folder")
    parser.add_argument(
        "--text-encoder",
        default="google/flan-t5-xl",
        metavar="FOLDER_OR_ID",
        help="a T5, as in backbone.text_encoder (default: google/flan-t5-xl)",
    )
    add_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=32, help="captions encoded at a time")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    options = parser.parse_args(arguments)
    for name in ("max_tokens", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    try:
        encoder = T5Features(
            options.text_encoder,
            num_slots=options.max_tokens,
            dim=None,
            cleaning=options.caption_cleaning,
            device=device(options.device),
        )
        encode(options.shards, encoder, Ranks(), batch_size=options.batch_size)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    exit_process(main())
