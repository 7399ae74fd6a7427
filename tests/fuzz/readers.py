"""Everything that reads a shard set, as functions of its folder."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

from data_tools import inspect_shards
from data_tools.check_shards import check_shard
from data_tools.encode_codes import pictures
from data_tools.samples import SampleSettings, make_sample
from data_tools.sources import Layout, webdataset
from mmtensorar.data import loader
from mmtensorar.data.shards import Manifest, iterate_shard
from mmtensorar.recipe import Data, Run, Train
from tests.fuzz.damage import NUM_SHARDS, PER_SHARD

Result = tuple[list[str], int]  # names of the samples read, and how many were reported missing


def read_check(folder: Path) -> Result:
    """check_shards: every sample is read, or its shard has a problem."""
    manifest = Manifest.read(folder, complete=False)
    keys, missing = [], 0
    for shard in manifest.shards:
        checked = check_shard(folder, shard, manifest)
        if checked.problems:
            missing += PER_SHARD  # the report names the bad shard and the problem
        keys += [read.key for read in checked.read]
    return keys, missing


def read_iterate(folder: Path) -> Result:
    """The reader of encode_codes and encode_text."""
    manifest = Manifest.read(folder)
    return [sample.key for shard in manifest.shards for sample in iterate_shard(folder, shard)], 0


def read_pictures(folder: Path) -> Result:
    """The pictures that encode_codes decodes."""
    manifest, keys = Manifest.read(folder), []
    for shard in manifest.shards:
        samples = iterate_shard(folder, shard)
        for batch, images in pictures(
            samples, folder / shard.name, image_size=manifest.image_size, batch_size=3, threads=1
        ):
            keys += [
                sample.key for sample, image in zip(batch, images, strict=True) if image.size == (16, 16)
            ]
    return keys, 0


def read_inspect(folder: Path) -> Result:
    manifest = Manifest.read(folder)
    statistics = inspect_shards.count(folder, manifest)
    inspect_shards.facts(folder, manifest, statistics)
    inspect_shards.histograms(statistics)
    inspect_shards.page(folder, manifest, statistics, 8)
    return [str(number) for number in range(len(statistics.words))], 0


def _stream(folder: Path, on_error: str) -> Result:
    total = NUM_SHARDS * PER_SHARD
    settings = Data(
        shards=str(folder), batch_size=total, shuffle=4, text_features="cached", on_error=on_error
    )
    recipe = SimpleNamespace(run=Run(name="fuzz"), data=settings, train=Train(steps=1))
    names, skipped = [], 0
    for batch in islice(loader.stream(recipe, None, rank=0, world_size=1), 1):
        names += batch.names
        skipped += len(batch.skipped)
    return list(dict.fromkeys(names)), skipped


def read_stream(folder: Path) -> Result:
    return _stream(folder, "raise")


def read_skipping(folder: Path) -> Result:
    return _stream(folder, "skip")


def read_source(folder: Path) -> Result:
    """make_shards --tars."""
    keys, missing = [], 0
    settings = SampleSettings(image_size=16)
    for number, item in enumerate(webdataset.read(str(folder), Layout()).items):
        try:
            item = item._replace(captions=item.captions[:1])
            keys.append(make_sample(f"{number}", item, settings).sample.key)
        except ValueError:
            missing += 1
    return keys, missing


Reader = Callable[[Path], Result]

READERS: dict[str, Reader] = {
    "check_shards": read_check,
    "encode_*": read_iterate,
    "encode_codes, pictures": read_pictures,
    "inspect_shards": read_inspect,
    "training": read_stream,
    "training, skip": read_skipping,
    "make_shards --tars": read_source,
}
