"""Measure how fast shards are written and streamed, compared with plain webdataset.

    python benchmarks/data.py
    python benchmarks/data.py --num-samples 2000 --num-pictures 400

Both sides read and write the same samples in turn, and the best of a few rounds counts,
because the machine may be busy.

- Writing: the same encoded members, by shards.write_tar (which also hashes the shard) and by
  webdataset.ShardWriter.
- Codes and captions, shuffled and batched, by loader.stream and by a plain webdataset
  pipeline, in this process. "first batch" is the time from the start to the first batch.
- Pictures of 256 pixels: as encode_codes.py reads them, by a plain webdataset pipeline, and by
  Pillow alone from one file per picture; each reader runs in one process per core.
- Memory: the peak of a process that only streams codes.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Python puts a script's own folder here; imports start at the checkout
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
from functools import partial
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


def small_samples(num: int) -> Iterator[Sample]:
    """Noisy pictures of 64 pixels, captions of about 60 letters, 24 x 24 codes."""
    rng = np.random.default_rng(0)
    for number in range(num):
        picture = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(picture, "JPEG", quality=90)
        codes = rng.integers(0, NUM_CODES, (1, SIDE * SIDE, 1)).astype(np.uint16)
        caption = f"picture number {number} of a set in which all of them are noise".encode()
        members = {"jpg": picture.getvalue(), "txt": caption, "json": b"{}", "codes.npy": encode_codes(codes)}
        yield Sample(f"{number:09d}", members)


def write_ours(folder: Path, samples: list[Sample], per_shard: int, image_size: int = 64) -> None:
    """A shard set of ours."""
    folder.mkdir()
    starts = range(0, len(samples), per_shard)
    shards = [
        write_tar(folder / f"{n:05d}.tar", samples[start : start + per_shard])
        for n, start in enumerate(starts)
    ]
    codes = Codes(
        image_tokenizer="noise", weight_hash="0" * 64, grid=(SIDE, SIDE), factor_sizes=(NUM_CODES,), crops=1
    )
    settings = dict(num_samples=len(samples), image_size=image_size, codes=codes, source="noise", seed=0)
    Manifest(shards=tuple(shards), **settings).write(folder)


def write_theirs(folder: Path, samples: list[Sample], per_shard: int, image_size: int = 64) -> None:
    """The same samples, written by webdataset."""
    folder.mkdir()
    with wds.ShardWriter(str(folder / "%05d.tar"), maxcount=per_shard, verbose=0) as sink:
        for sample in samples:
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
    """Seconds to the first batch, and samples per second after it."""
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
    """Smooth pictures with some noise, of about as many bytes as photographs."""
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
    """Print the table of pictures per second."""
    samples, num_processes = list(large_samples(num)), os.cpu_count() or 1
    per_shard = num // (2 * num_processes)
    for name, write in (("ours", write_ours), ("theirs", write_theirs)):
        write(folder / name, samples, per_shard, LARGE)
    (folder / "plain").mkdir()
    for sample in samples:
        (folder / "plain" / f"{sample.key}.jpg").write_bytes(sample.members["jpg"])
    readers = {"ours": pictures_ours, "theirs": pictures_theirs, "plain": pictures_plain}
    rates = dict.fromkeys(readers, 0.0)
    with ProcessPoolExecutor(num_processes) as pool:
        for _ in range(ROUNDS + 1):  # in the first round each process imports what it needs
            for name, read in readers.items():
                began = time.perf_counter()
                folders, counts = [folder / name] * num_processes, [num_processes] * num_processes
                assert sum(pool.map(read, folders, range(num_processes), counts)) == num
                rates[name] = max(rates[name], num / (time.perf_counter() - began))
    size = len(samples[0].members["jpg"])
    print(f"\n{num} pictures of {LARGE} pixels and {size} bytes, in {num_processes} processes\n")
    print("| | pictures/s | ours / it |\n|---|---:|---:|")
    names = {"ours": "ours", "webdataset": "theirs", "Pillow alone": "plain"}
    for title, name in names.items():
        print(f"| {title} | {rates[name]:,.0f} | {rates['ours'] / rates[name]:.2f} |")


def peak_mib(stream: Callable[[Path], Iterator], folder: Path, num: int) -> float:
    """Peak memory of a process that only streams."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, stream, folder, num).result()


def _peak(stream: Callable[[Path], Iterator], folder: Path, num: int) -> float:
    for _ in islice(stream(folder), num // BATCH):
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


WRITERS = {"ours": write_ours, "theirs": write_theirs}
STREAMS = {"ours": stream_ours, "theirs": stream_theirs}


def compare_writing(folder: Path, samples: list[Sample], per_shard: int) -> None:
    """Print a row of the table; the sets stay in folder/ours0 and folder/theirs0."""
    times: dict[str, list[float]] = {name: [] for name in WRITERS}
    for turn in range(ROUNDS):
        for name, write in WRITERS.items():
            began = time.perf_counter()
            write(folder / f"{name}{turn}", samples, per_shard)
            times[name].append(time.perf_counter() - began)
    ours, theirs = (len(samples) / min(times[name]) for name in times)
    print(f"| written, samples/s | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.2f} |")


def compare_streams(folder: Path, num: int) -> None:
    """Print three rows of the table, from the sets of compare_writing."""
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in STREAMS}
    for _ in range(ROUNDS):
        for name, stream in STREAMS.items():
            results[name].append(streamed(partial(stream, folder / f"{name}0"), num))
    starts = [min(start for start, _ in rounds) for rounds in results.values()]
    ours, theirs = (max(rate for _, rate in rounds) for rounds in results.values())
    print(f"| codes streamed, samples/s | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.2f} |")
    print(f"| first batch after, s | {starts[0]:.2f} | {starts[1]:.2f} | |")
    ours, theirs = (peak_mib(stream, folder / f"{name}0", num) for name, stream in STREAMS.items())
    print(f"| peak memory, MiB | {ours:,.0f} | {theirs:,.0f} | |")


def main() -> None:
    assert __doc__ is not None
    description, _, epilog = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-samples", type=int, default=20_000, help="(default: 20000)")
    parser.add_argument("--num-pictures", type=int, default=6000, help="of 256 pixels (default: 6000)")
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="(default: 1000)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    samples = list(small_samples(options.num_samples))
    size = sum(map(len, samples[0].members.values()))
    print(f"{len(samples)} samples of {size} bytes, {options.samples_per_shard} a shard")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print("\n| | ours | webdataset | ours / webdataset |\n|---|---:|---:|---:|")
        compare_writing(folder, samples, options.samples_per_shard)
        compare_streams(folder, len(samples))
        (folder / "large").mkdir()
        compare_pictures(folder / "large", options.num_pictures)


if __name__ == "__main__":
    main()
