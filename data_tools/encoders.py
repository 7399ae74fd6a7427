"""The encoders of make_shards.py: image codes and text features, added in the same
pass.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mmtensorar.data.shards import Codes, Sample, TextFeatures
from mmtensorar.words import counted


class Encoder(NamedTuple):
    """entries: field -> value, for the manifest. encode: see build_stages.add_codes.

    notes: returns sentences about what was encoded, for the end.
    """

    entries: dict[str, Codes | TextFeatures]
    encode: Callable[[Iterable[Sample], Path], Iterator[Sample]]
    notes: Callable[[], list[str]] = list


def load_encoders(options: argparse.Namespace, classes: tuple[str, ...] | None) -> Encoder | None:
    """The encoders of --image-tokenizer and --text-encoder, one after the other.

    None when neither option is given. classes: the set's class names, if its captions
    are class numbers; text features then raise ValueError.
    """
    encoders = [load_image_tokenizer(options)] if options.image_tokenizer else []
    if options.text_encoder:
        if classes is not None:
            raise ValueError(
                f"--text-encoder: the captions are numbers of {counted(len(classes), 'class')}, "
                "which have no text features"
            )
        encoders.append(load_text_encoder(options))
    if not encoders:
        return None

    def encode(samples: Iterable[Sample], path: Path) -> Iterator[Sample]:
        for encoder in encoders:
            samples = encoder.encode(samples, path)
        return iter(samples)

    def notes() -> list[str]:
        return [note for encoder in encoders for note in encoder.notes()]

    entries = {key: value for encoder in encoders for key, value in encoder.entries.items()}
    return Encoder(entries, encode, notes)


def load_text_encoder(options: argparse.Namespace) -> Encoder:
    """The text encoder of --text-encoder."""
    from data_tools import encode_text  # imports torch
    from mmtensorar import devices
    from mmtensorar.captions.encoders import T5Features

    encoder = T5Features(
        options.text_encoder,
        device=devices.pick(options.device),
        num_slots=options.max_tokens,
        dim=None,
        cleaning=options.caption_cleaning,
    )
    expected = encode_text.features_of(encoder)
    size, cut = options.batch_size, encode_text.CutCaptions()

    def encode(samples: Iterable[Sample], path: Path) -> Iterator[Sample]:
        return encode_text.encode_samples(samples, item_name, encoder, expected, batch_size=size, cut=cut)

    def notes() -> list[str]:
        count = encoder.emptied.count
        emptied = [encode_text.emptied_note(count, encoder.cleaning)] if count else []
        return [*emptied, *cut.notes()]

    return Encoder({"text_features": expected}, encode, notes)


def item_name(sample: Sample) -> str:
    """The item that a sample was made of, as its json member says.

    The part that the sample is in has another name when the set is finished.
    """
    meta = json.loads(sample.members["json"])
    return f"{meta.get('source')} {meta.get('name') or f'item {int(sample.key)}'}"


def load_image_tokenizer(options: argparse.Namespace) -> Encoder:
    """The image tokenizer of --image-tokenizer.

    Raises ValueError when pictures of --image-size do not fit it.
    """
    from data_tools import encode_codes  # imports torch
    from mmtensorar.checkpoints.recognise import image_tokenizer_from_arguments

    tokenizer_options = argparse.Namespace(
        image_tokenizer=options.image_tokenizer,
        name=options.name,
        device=options.device,
        image_size=options.tokenizer_size,
    )
    image_tokenizer, device = image_tokenizer_from_arguments(tokenizer_options)
    codes = encode_codes.codes_of(image_tokenizer, crops=options.crops, precision=options.precision)
    encode_codes.check_size(str(options.out), options.image_size, image_tokenizer.image_size, options.crops)
    settings: dict[str, Any] = dict(
        image_size=options.image_size, batch_size=options.batch_size, device=device
    )
    return Encoder(
        {"codes": codes},
        lambda samples, path: encode_codes.encode_samples(samples, path, image_tokenizer, codes, **settings),
    )
