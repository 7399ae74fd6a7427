"""Shards written and streamed, beside plain webdataset on the same samples: python benchmarks/data.py [--num-samples 20000]

Both sides take turns; the best of a few rounds each is compared, since the machine may be busy. Writing: the same encoded
members through shards.write_tar (which also hashes the shard) and webdataset.ShardWriter. Codes and captions, shuffled and
batched, by data.stream and by a plain webdataset pipeline, in this process; start is until the first batch. Pictures of 256
pixels, as encode_codes.py reads them, by a plain webdataset pipeline, and by nothing but Pillow from a file each, each in one
process a core. Memory: the most that a process which only streams codes has held.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import io
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from types import SimpleNamespace

import numpy as np
import torch
import webdataset as wds
from PIL import Image

from mmtensorar.data import loader
from mmtensorar.data.members import encode_codes
from mmtensorar.data.shards import Codes, Manifest, Sample, iterate_shard, write_tar
from mmtensorar.model.conditions import Condition
from mmtensorar.recipe import Data, Run, Train

SIDE, NUM_CODES, BATCH = 24, 16_384, 64
LARGE = 256  # pixels a side
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


def write_ours(folder: Path, found: list[Sample], per_shard: int, image_size: int = 64) -> None:
    folder.mkdir()
    starts = range(0, len(found), per_shard)
    shards = [
        write_tar(folder / f"{n:05d}.tar", found[start : start + per_shard]) for n, start in enumerate(starts)
    ]
    codes = Codes(
        image_tokenizer="noise", weight_hash="0" * 64, grid=(SIDE, SIDE), factor_sizes=(NUM_CODES,), crops=1
    )
    settings = dict(num_samples=len(found), image_size=image_size, codes=codes, source="noise", seed=0)
    Manifest(shards=tuple(shards), **settings).write(folder)


def write_theirs(folder: Path, found: list[Sample], per_shard: int, image_size: int = 64) -> None:
    folder.mkdir()
    with wds.ShardWriter(str(folder / "%05d.tar"), maxcount=per_shard, verbose=0) as sink:
        for sample in found:
            sink.write({"__key__": sample.key, **sample.members})


def captions_only(captions: list[str]) -> Condition:
    return Condition(torch.zeros(len(captions), 1), torch.ones(len(captions), 1, dtype=torch.bool))


def stream_ours(folder: Path) -> Iterator:
    recipe = SimpleNamespace(
        run=Run(name="benchmark"),
        data=Data(shards=str(folder), batch_size=BATCH, shuffle=1000),
        train=Train(steps=1),
    )
    return loader.stream(recipe, captions_only, rank=0, world_size=1)


def stream_theirs(folder: Path) -> Iterator:
    urls = sorted(map(str, folder.glob("*.tar")))
    pipeline = wds.DataPipeline(
        wds.ResampledShards(urls),
        wds.tarfile_to_samples(),
        wds.shuffle(1000),
        wds.map(lambda sample: (np.load(io.BytesIO(sample["codes.npy"]))[0], sample["txt"].decode())),
        wds.batched(
            BATCH,
            collation_fn=lambda rows: (np.stack([codes for codes, _ in rows]), [text for _, text in rows]),
        ),
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


# ---- pictures, in processes --------------------------------------------------------------------


def pictures_ours(folder: Path, number: int, of: int) -> int:
    from data_tools.encode_codes import pictures

    count = 0
    for shard in Manifest.read(folder).shards[number::of]:
        samples = iterate_shard(folder, shard)
        for _, images in pictures(samples, folder / shard.name, image_size=LARGE, batch_size=32, threads=1):
            count += len([np.asarray(image) for image in images])
    return count


def pictures_theirs(folder: Path, number: int, of: int) -> int:
    pipeline = wds.DataPipeline(
        wds.SimpleShardList(sorted(map(str, folder.glob("*.tar")))[number::of]),
        wds.tarfile_to_samples(),
        wds.decode("rgb8"),
        wds.batched(32, collation_fn=lambda rows: [row["jpg"] for row in rows]),
    )
    return sum(len(batch) for batch in pipeline)


def pictures_plain(folder: Path, number: int, of: int) -> int:
    count = 0
    for path in sorted(folder.glob("*.jpg"))[number::of]:
        with Image.open(path) as image:
            count += len(np.asarray(image.convert("RGB"))) == LARGE
    return count


def large_samples(num: int) -> Iterator[Sample]:
    """Smooth pictures with some noise, about as large in bytes as photographs."""
    rng = np.random.default_rng(1)
    for number in range(num):
        smooth = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize(
            (LARGE, LARGE), Image.Resampling.BICUBIC
        )
        pixels = np.asarray(smooth).astype(np.int16) + rng.integers(-12, 13, (LARGE, LARGE, 3))
        picture = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(picture, "JPEG", quality=90)
        codes = encode_codes(np.zeros((1, SIDE * SIDE, 1), np.uint16))
        yield Sample(
            f"{number:09d}", {"jpg": picture.getvalue(), "txt": b"noise", "json": b"{}", "codes.npy": codes}
        )


def compare_pictures(folder: Path, num: int) -> None:
    found, of = list(large_samples(num)), os.cpu_count()
    per_shard = num // (2 * of)
    for name, write in (("ours", write_ours), ("theirs", write_theirs)):
        write(folder / name, found, per_shard, LARGE)
    (folder / "plain").mkdir()
    for sample in found:
        (folder / "plain" / f"{sample.key}.jpg").write_bytes(sample.members["jpg"])
    readers = {"ours": pictures_ours, "theirs": pictures_theirs, "plain": pictures_plain}
    rates = dict.fromkeys(readers, 0.0)
    with ProcessPoolExecutor(of) as pool:
        for _ in range(ROUNDS + 1):  # the first one imports what each needs
            for name, read in readers.items():
                began = time.perf_counter()
                assert sum(pool.map(read, [folder / name] * of, range(of), [of] * of)) == num
                rates[name] = max(rates[name], num / (time.perf_counter() - began))
    size = len(found[0].members["jpg"])
    print(f"\n{num} pictures of {LARGE} pixels and {size} bytes, in {of} processes\n")
    print("| | pictures/s | ours / it |\n|---|---:|---:|")
    for name, rate in {
        "ours": rates["ours"],
        "webdataset": rates["theirs"],
        "Pillow alone": rates["plain"],
    }.items():
        print(f"| {name} | {rate:,.0f} | {rates['ours'] / rate:.2f} |")


def peak_mib(stream: Callable[[Path], Iterator], folder: Path, num: int) -> float:
    """Of a process that does nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, stream, folder, num).result()


def _peak(stream: Callable[[Path], Iterator], folder: Path, num: int) -> float:
    for _ in islice(stream(folder), num // BATCH):
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-samples", type=int, default=20_000)
    parser.add_argument("--num-pictures", type=int, default=6000, help="of 256 pixels")
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = list(samples(options.num_samples))
    print(
        f"{len(found)} samples of {sum(map(len, found[0].members.values()))} bytes, {options.samples_per_shard} a shard"
    )
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
        best = {
            name: (min(start for start, _ in each), max(rate for _, rate in each))
            for name, each in rates.items()
        }
        (ours_start, ours), (theirs_start, theirs) = best.values()
        print(f"| codes streamed, samples/s | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.2f} |")
        print(f"| first batch after, s | {ours_start:.2f} | {theirs_start:.2f} | |")
        ours, theirs = (
            peak_mib(stream, Path(temporary) / f"{name}0", len(found))
            for name, stream in (("ours", stream_ours), ("theirs", stream_theirs))
        )
        print(f"| most memory, MiB | {ours:,.0f} | {theirs:,.0f} | |")
        (Path(temporary) / "large").mkdir()
        compare_pictures(Path(temporary) / "large", options.num_pictures)


if __name__ == "__main__":
    main()
