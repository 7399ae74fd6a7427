"""The options of make_shards.py, in groups, and the rules about which may be
combined.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_tools import storage
from data_tools.argument_types import (
    column_names,
    fraction,
    image_side,
    num_bytes,
    positive,
    quality,
    ratio,
    whole,
)
from data_tools.pipeline import LEFT_OUT
from data_tools.sources import READING, Source, known_sources
from mmtensorar.cli import Parser

Sources = Mapping[str, Source]


def parse(arguments: list[str] | None, *, description: str, epilog: str) -> argparse.Namespace:
    """Parse a command line.

    Adds to the options: source, the kind of source, and location, the value of its
    option.
    """
    sources = known_sources()
    parser = Parser(
        prog="python -m data_tools.make_shards",
        description=description,
        epilog=epilog,
        allow_abbrev=False,
    )
    _add_sources(parser, sources)
    _add_reading(parser, sources)
    _add_filters(parser)
    _add_pictures(parser)
    _add_encoders(parser)
    _add_sets(parser)
    _add_work(parser)
    options = parser.parse_args(arguments)
    options.source = next(kind for kind in sources if getattr(options, kind) is not None)
    options.location = getattr(options, options.source)
    for rule in RULES:
        if problem := rule(options, parser.get_default, sources):
            parser.error(problem)
    options.image_size = options.image_size or sources[options.source].image_size
    options.image_root = options.image_root and options.image_root.resolve()
    return options


# ---- groups ----------------------------------------------------------------------------------


def _add_sources(parser: argparse.ArgumentParser, sources: Sources) -> None:
    group = parser.add_argument_group("where samples come from (one of them)")
    exclusive = group.add_mutually_exclusive_group(required=True)
    for source in sources.values():
        if source.choices is None:
            exclusive.add_argument(source.option, metavar="LOCATION", help=source.help)
        else:
            exclusive.add_argument(source.option, choices=source.choices, help=source.help)


def _add_reading(parser: argparse.ArgumentParser, sources: Sources) -> None:
    group = parser.add_argument_group("how the source is read")
    group.add_argument(
        "--image-column",
        type=str.strip,
        default="image",
        metavar="NAME",
        help="column or key (default: image)",
    )
    group.add_argument(
        "--caption-columns",
        type=column_names,
        metavar="A,B",
        help="columns or keys of captions (default: caption)",
    )
    group.add_argument(
        "--captions",
        choices=["first", "random", "each"],
        default="first",
        help="of several captions take the first or a random one, or make a sample with each "
        "(default: first)",
    )
    group.add_argument(
        "--image-root",
        type=storage.argument,
        help="folder that paths are relative to (default: the table's own)",
    )
    group.add_argument("--split", default="train", help="of a dataset (default: train)")
    group.add_argument(
        "--class-template",
        action="append",
        default=[],
        metavar="TEXT",
        help="captions from class names, such as 'a photo of a {}'; may be given several times",
    )
    group.add_argument(
        "--class-names", type=Path, metavar="JSON", help='{"n01440764": "tench"}: names of folders or numbers'
    )
    for option, settings in _own_arguments(sources).items():
        group.add_argument(option, **settings)
    group.add_argument("--limit", type=positive, help="take only this many items, at random")


def _own_arguments(sources: Sources) -> dict[str, Mapping[str, Any]]:
    """The options that sources declare for themselves; several may declare the same
    one.
    """
    return {option: settings for source in sources.values() for option, settings in source.arguments.items()}


def _add_filters(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which samples are taken")
    group.add_argument("--min-side", type=positive, default=0, metavar="PIXELS", help="smaller side at least")
    group.add_argument(
        "--max-aspect", type=ratio, default=0.0, metavar="RATIO", help="longer side over smaller at most"
    )
    group.add_argument("--min-caption", type=positive, default=0, metavar="CHARACTERS")
    group.add_argument("--max-caption", type=positive, default=0, metavar="CHARACTERS")
    group.add_argument(
        "--deduplicate",
        nargs="?",
        choices=["samples", "pictures"],
        const="samples",
        default=False,
        help="take only the first of equal pictures with equal captions (samples, the default), "
        "or of equal pictures",
    )
    group.add_argument(
        "--on-error",
        choices=["raise", "skip"],
        default="raise",
        help="a picture that is damaged or has no caption: stop, or leave it out and list it in "
        f"{LEFT_OUT} (default: raise)",
    )


def _add_pictures(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--image-size",
        type=image_side,
        help="pixels a side (default: 384; 64 for shapes): the image tokenizer's size, or a larger one "
        "for shards encode-codes --crops 10; LlamaGen's is 1.1 times, 281 for 256 and 422 for 384",
    )
    group.add_argument(
        "--crop",
        choices=["center", "random", "pad", "stretch"],
        default="center",
        help="a square from the middle or from a random position, or the whole picture, on white or "
        "stretched (default: center)",
    )
    group.add_argument(
        "--format",
        choices=["jpg", "png", "webp", "keep"],
        default="jpg",
        help="keep: pictures that already have the size stay unchanged (default: jpg)",
    )
    group.add_argument("--quality", type=quality, default=95, help="of jpg and webp, to 100 (default: 95)")


def _add_encoders(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("codes and text features, added in the same pass")
    group.add_argument(
        "--image-tokenizer",
        metavar="PATH",
        help="add codes as shards encode-codes would: folder, file or hub id",
    )
    group.add_argument("--name", help="kind of image tokenizer, if its tensors do not show it")
    group.add_argument(
        "--tokenizer-size",
        type=positive,
        metavar="PIXELS",
        help="the image tokenizer's, if its files do not say",
    )
    group.add_argument(
        "--crops", type=int, choices=[1, 2, 5, 10], default=1, help="codes per image, see shards encode-codes"
    )
    group.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="of encoding (default: fp32)"
    )
    group.add_argument(
        "--text-encoder",
        metavar="PATH",
        help="add text features as shards encode-text would: a T5's folder or hub id",
    )
    group.add_argument(
        "--caption-cleaning",
        choices=["original", "original_or_raw", "lower", "none"],
        default="original",
        help="see shards encode-text",
    )
    group.add_argument(
        "--max-tokens", type=positive, default=120, help="longer captions are cut (default: 120)"
    )
    group.add_argument(
        "--batch-size",
        type=positive,
        default=32,
        help="images (or crops), or captions, at a time (default: 32)",
    )
    group.add_argument("--device", help="for encoding (default: cuda if there is one, else cpu)")


def _add_sets(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sets")
    group.add_argument(
        "--out",
        type=storage.folder_to_write,
        required=True,
        metavar="LOCATION",
        help="shard folder to make, or its URL (s3, gs, hf)",
    )
    group.add_argument(
        "--samples-per-shard", type=positive, default=1000, metavar="N", help="(default: 1000)"
    )
    group.add_argument(
        "--bytes-per-shard", type=num_bytes, default=0, metavar="N", help="instead: such as 500M or 1G"
    )
    group.add_argument(
        "--validation-share",
        type=fraction,
        default=0.0,
        help="put this share, by the hash of each picture's content, into a second set, OUT_validation",
    )
    group.add_argument("--seed", type=whole, default=0, help="of the order, and of everything random")
    group.add_argument(
        "--overwrite", action="store_true", help="replace another set in --out once the new one is made"
    )


def _add_work(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where the work runs")
    group.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes (default: cores)")
    group.add_argument(
        "--engine",
        choices=["local", "ray"],
        default="local",
        help="processes of this machine, or Ray Data, here or on a cluster (default: local)",
    )
    group.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="of a cluster, such as auto or ray://head:10001 (default: start Ray here)",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing; try the first pictures and print what would be made",
    )


# ---- rules -----------------------------------------------------------------------------------

# (options, default of an option, sources) -> the problem, or None
Rule = Callable[[argparse.Namespace, Callable[[str], Any], Sources], str | None]


def _first_given(options: argparse.Namespace, default: Callable[[str], Any], *names: str) -> str | None:
    """The first of some options whose value is not its default, as it is written."""
    given = (name for name in names if getattr(options, name) != default(name))
    return next((f"--{name.replace('_', '-')}" for name in given), None)


def _goes_with_image_tokenizer(
    options: argparse.Namespace, default: Callable, sources: Sources
) -> str | None:
    if options.image_tokenizer:
        return None
    option = _first_given(options, default, "name", "tokenizer_size", "crops", "precision")
    return option and f"{option} goes with --image-tokenizer"


def _goes_with_text_encoder(options: argparse.Namespace, default: Callable, sources: Sources) -> str | None:
    if options.text_encoder:
        return None
    option = _first_given(options, default, "caption_cleaning", "max_tokens")
    return option and f"{option} goes with --text-encoder"


def _goes_with_any_encoder(options: argparse.Namespace, default: Callable, sources: Sources) -> str | None:
    if options.image_tokenizer or options.text_encoder:
        return None
    option = _first_given(options, default, "batch_size", "device")
    return option and f"{option} goes with --image-tokenizer or --text-encoder"


def _goes_with_its_source(options: argparse.Namespace, default: Callable, sources: Sources) -> str | None:
    """A source's own options have no effect with another source."""
    for option in _own_arguments(sources).keys() - sources[options.source].arguments.keys():
        if _first_given(options, default, option.lstrip("-").replace("-", "_")):
            owners = [source.option for source in sources.values() if option in source.arguments]
            return f"{option} goes with {_any_of(owners)}"
    return None


def _goes_with_sources_that_use_it(
    options: argparse.Namespace, default: Callable, sources: Sources
) -> str | None:
    for option in READING:
        if option in sources[options.source].uses:
            continue
        if _first_given(options, default, option.lstrip("-").replace("-", "_")):
            return f"{option} goes with {_any_of([s.option for s in sources.values() if option in s.uses])}"
    return None


def _templates_need_classes(options: argparse.Namespace, default: Callable, sources: Sources) -> str | None:
    option = _first_given(options, default, "class_template", "class_names")
    if option is None or sources[options.source].has_classes:
        return None
    with_classes = [source.option for source in sources.values() if source.has_classes]
    return f"{option} goes with {_any_of(with_classes)}"


def _templates_hold_a_name(options: argparse.Namespace, default: Callable, sources: Sources) -> str | None:
    bad = next((template for template in options.class_template if "{}" not in template), None)
    return None if bad is None else f"--class-template {bad!r} has no {{}} for the name"


def _address_needs_ray(options: argparse.Namespace, default: Callable, sources: Sources) -> str | None:
    if options.ray_address and options.engine != "ray":
        return "--ray-address goes with --engine ray"
    return None


def _any_of(names: list[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


RULES: tuple[Rule, ...] = (
    _goes_with_image_tokenizer,
    _goes_with_text_encoder,
    _goes_with_any_encoder,
    _goes_with_its_source,
    _goes_with_sources_that_use_it,
    _templates_hold_a_name,
    _templates_need_classes,
    _address_needs_ray,
)
