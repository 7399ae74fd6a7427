"""Shards written and streamed, beside plain webdataset on the same samples: python benchmarks/data.py [--num-samples 20000]

Both sides run in this process and take turns; the best of a few rounds each is compared, since the machine may be busy.
Writing: the same encoded members through shards.write_tar (which also hashes the shard) and webdataset.ShardWriter.
Streaming: codes and captions, shuffled and batched, by data.stream and by a plain webdataset pipeline. Start: until the first
batch.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from types import SimpleNamespace

import numpy as np
import torch
import webdataset as wds
from PIL import Image

from mmtensorar import data
from mmtensorar.backbones import Condition
from mmtensorar.recipe import Data, Run, Train
from mmtensorar.shards import Codes, Manifest, Sample, encode_codes, write_tar

SIDE, NUM_CODES, BATCH = 24, 16_384, 64
ROUNDS = 3


def samples(num: int) -> Iterator[Sample]:
    """A noisy picture of 64 pixels, a caption of about 60 letters, 24 x 24 codes."""
    rng = np.random.default_rng(0)
    for number in range(num):
        picture = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(picture, "JPEG", quality=90)
        codes = rng.integers(0, NUM_CODES, (1, SIDE * SIDE, 1)).astype(np.uint16)
        caption = f"picture number {number} of a set in which all of them are noise".encode()
        members = {"jpg": picture.getvalue(), "txt": caption, "json": b"{}", "codes.npy": encode_codes(codes)}
        yield Sample(f"{number:09d}", members)


def write_ours(folder: Path, found: list[Sample], per_shard: int) -> None:
    folder.mkdir()
    starts = range(0, len(found), per_shard)
    shards = [write_tar(folder / f"{n:05d}.tar", found[start : start + per_shard]) for n, start in enumerate(starts)]
    codes = Codes(image_tokenizer="noise", weight_hash="0" * 64, grid=(SIDE, SIDE), factor_sizes=(NUM_CODES,), crops=1)
    settings = dict(num_samples=len(found), image_size=64, codes=codes, source="noise", seed=0)
    Manifest(shards=tuple(shards), **settings).write(folder)


def write_theirs(folder: Path, found: list[Sample], per_shard: int) -> None:
    folder.mkdir()
    with wds.ShardWriter(str(folder / "%05d.tar"), maxcount=per_shard, verbose=0) as sink:
        for sample in found:
            sink.write({"__key__": sample.key, **sample.members})


def captions_only(captions: list[str]) -> Condition:
    return Condition(torch.zeros(len(captions), 1), torch.ones(len(captions), 1, dtype=torch.bool))


def stream_ours(folder: Path) -> Iterator:
    recipe = SimpleNamespace(
        run=Run(name="benchmark"), data=Data(shards=str(folder), batch_size=BATCH, shuffle=1000), train=Train(steps=1)
    )
    return data.stream(recipe, captions_only, rank=0, world_size=1)


def stream_theirs(folder: Path) -> Iterator:
    urls = sorted(map(str, folder.glob("*.tar")))
    pipeline = wds.DataPipeline(
        wds.ResampledShards(urls),
        wds.tarfile_to_samples(),
        wds.shuffle(1000),
        wds.map(lambda sample: (np.load(io.BytesIO(sample["codes.npy"]))[0], sample["txt"].decode())),
        wds.batched(BATCH, collation_fn=lambda rows: (np.stack([codes for codes, _ in rows]), [text for _, text in rows])),
    )
    for codes, texts in pipeline:
        yield torch.from_numpy(codes.astype(np.int64)), captions_only(texts), None


def streamed(stream: Callable[[], Iterator], num: int) -> tuple[float, float]:
    """Seconds to the first batch, and samples a second after it."""
    began = time.perf_counter()
    batches = stream()
    next(batches)
    first = time.perf_counter()
    for _ in islice(batches, num // BATCH):
        pass
    return first - began, num // BATCH * BATCH / (time.perf_counter() - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-samples", type=int, default=20_000)
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = list(samples(options.num_samples))
    print(f"{len(found)} samples of {sum(map(len, found[0].members.values()))} bytes, {options.samples_per_shard} a shard")
    with tempfile.TemporaryDirectory() as temporary:
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        for turn in range(ROUNDS):
            for name, write in (("ours", write_ours), ("theirs", write_theirs)):
                began = time.perf_counter()
                write(Path(temporary) / f"{name}{turn}", found, options.samples_per_shard)
                times[name].append(time.perf_counter() - began)
        ours, theirs = (len(found) / min(times[name]) for name in times)
        print("\n| | ours | webdataset | ours / webdataset |\n|---|---:|---:|---:|")
        print(f"| written, samples/s | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.2f} |")
        rates: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
        for _ in range(ROUNDS):
            for name, stream in (("ours", stream_ours), ("theirs", stream_theirs)):
                folder = Path(temporary) / f"{name}0"
                rates[name].append(streamed(lambda stream=stream, folder=folder: stream(folder), len(found)))
        best = {name: (min(start for start, _ in each), max(rate for _, rate in each)) for name, each in rates.items()}
        (ours_start, ours), (theirs_start, theirs) = best.values()
        print(f"| codes streamed, samples/s | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.2f} |")
        print(f"| first batch after, s | {ours_start:.2f} | {theirs_start:.2f} | |")


if __name__ == "__main__":
    main()
