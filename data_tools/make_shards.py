"""Make shards of images and captions, in WebDataset's layout (see mmtensorar/shards.py).

    python data_tools/make_shards.py --folder my_images --out data/mine          a.jpg beside a.txt, at any depth
    python data_tools/make_shards.py --jsonl my_images/list.jsonl --out data/mine    {"image": path, "caption": text}
    python data_tools/make_shards.py --class-folder imagenet/train --out data/imagenet    a sub-folder per class
    python data_tools/make_shards.py --synthesize shapes --num-samples 4096 --out data/shapes

The same arguments give the same bytes, whatever the number of workers. A finished set is reused; an interrupted run
goes on where it stopped when the same command is given again.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a script, the folder of this file stands first

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from tqdm import tqdm

from data_tools import sources
from mmtensorar.shards import MANIFEST, Manifest, Sample, Shard, Staging, sha256, square, write_tar


def make_sample(key: str, item: sources.Item, image_size: int) -> Sample:
    """Load one item and make it square."""
    image = item.image()
    meta = item.meta | {"size": list(image.size)}
    jpeg = io.BytesIO()
    square(image, image_size).save(jpeg, "JPEG", quality=95, subsampling=0)
    return Sample(
        key, {"jpg": jpeg.getvalue(), "txt": item.caption.encode(), "json": json.dumps(meta, sort_keys=True).encode()}
    )


def make_shard(path: Path, first: int, items: list[sources.Item], image_size: int) -> Shard:
    """Write one shard. first: place of its first item in the whole set, from which the keys are counted."""
    return write_tar(path, (make_sample(f"{first + i:09d}", item, image_size) for i, item in enumerate(items)))


def in_processes(tasks: list[tuple], workers: int) -> Iterator[Shard]:
    """make_shard(*task) for each task, in any order. An error or an interrupt ends all workers at once."""
    if workers == 1 or len(tasks) <= 1:
        yield from (make_shard(*task) for task in tasks)
        return
    with ProcessPoolExecutor(min(workers, len(tasks)), initializer=follow_parent) as pool:
        try:
            for future in as_completed([pool.submit(make_shard, *task) for task in tasks]):
                yield future.result()
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def follow_parent() -> None:
    """In a worker: end without a word at Ctrl-C, and when the parent is gone, however it ended."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def read_source(options: argparse.Namespace) -> tuple[str, list[sources.Item], tuple[str, ...] | None]:
    """The source's description for the manifest, its items in the order of the shards, and the names of its classes."""
    if options.synthesize:
        size = options.image_size
        # Drawn at random already; and a set of more samples begins with the samples of a smaller one.
        return "shapes", list(sources.synthesize_shapes(options.num_samples, seed=options.seed, size=size)), None
    kinds = {"folder": sources.folder, "class_folder": sources.class_folder, "jsonl": sources.jsonl}
    kind, path = next((kind, path) for kind in kinds if (path := getattr(options, kind)))
    classes = sources.class_names(path) if kind == "class_folder" else None
    found = kinds[kind](path)
    items = list(tqdm(found, desc="listing", unit=" images", disable=None))
    # Names, captions and file sizes, so that a changed source is not taken for the old one.
    digest = hashlib.sha256(json.dumps([(i.key, i.caption, i.meta) for i in items], sort_keys=True).encode()).hexdigest()
    order = np.random.default_rng(options.seed).permutation(len(items))
    return f"{kind} {path.resolve().name} {digest[:16]}", [items[i] for i in order], classes


def describe(manifest: Manifest) -> str:
    of_classes = f" in {len(manifest.classes)} classes" if manifest.classes else ""
    source = f"{manifest.source!r}{of_classes}"
    return f"{manifest.num_samples} samples of {source}, {manifest.image_size} pixels, seed {manifest.seed}"


def make(options: argparse.Namespace) -> None:
    out, per_shard = options.out, options.samples_per_shard
    Staging.recover(out)
    old = Manifest.read(out) if (out / MANIFEST).exists() else None
    if old is None and out.exists():
        if not out.is_dir():
            raise ValueError(f"{out} is a file; choose another --out")
        strangers = [path for path in out.iterdir() if not path.name.startswith(Staging.PREFIX)]
        if strangers:
            raise ValueError(
                f"{out} is not a shard folder: it has no {MANIFEST}, but {strangers[0].name}; choose another --out"
            )
    source, items, classes = read_source(options)
    starts = range(0, len(items), per_shard)
    # What the shards depend on. A set that has had codes added still is this set.
    wanted = {
        "source": source,
        "seed": options.seed,
        "image_size": options.image_size,
        "counts": [min(per_shard, len(items) - start) for start in starts],
    }
    if old is not None:
        found = {key: getattr(old, key) for key in ("source", "seed", "image_size")}
        if found | {"counts": [shard.num_samples for shard in old.shards]} == wanted:
            print(f"reusing {out}: {describe(old)}")
            return
        if not options.overwrite:
            raise ValueError(f"{out} holds another set ({describe(old)}); choose another --out, or add --overwrite")

    staging = Staging(out, wanted)
    finished, tasks = {}, []
    for number, start in enumerate(starts):
        path = staging.path / f"{number:05d}.tar"
        if staging.finished(path.name):
            finished[path.name] = Shard(name=path.name, num_samples=wanted["counts"][number], sha256=sha256(path))
        else:
            tasks.append((path, start, items[start : start + per_shard], options.image_size))
    if finished:
        print(f"continuing {out}: {len(finished)} of {len(starts)} shards are there")
    initial = sum(shard.num_samples for shard in finished.values())
    with tqdm(desc="making shards", unit=" images", total=len(items), initial=initial, disable=None) as progress:
        for shard in in_processes(tasks, options.workers):
            finished[shard.name] = shard
            progress.update(shard.num_samples)
    manifest = Manifest(
        shards=tuple(finished[name] for name in sorted(finished)),
        num_samples=len(items),
        image_size=options.image_size,
        classes=classes,
        source=source,
        seed=options.seed,
    )
    staging.commit(manifest)
    print(f"{out}: {describe(manifest)}, in {len(manifest.shards)} shards")


def positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--folder", type=Path, help="images with a .txt caption of the same name, at any depth")
    source.add_argument(
        "--class-folder",
        type=Path,
        metavar="ROOT",
        help="images in one sub-folder per class; the sorted names give the class numbers, as in torchvision's "
        "ImageFolder",
    )
    source.add_argument("--jsonl", type=Path, help='lines {"image": path relative to this file, "caption": text}')
    source.add_argument("--synthesize", choices=["shapes"], help="draw an embedded world")
    parser.add_argument("--out", type=Path, required=True, help="shard folder to make")
    parser.add_argument(
        "--image-size",
        type=positive,
        help="pixels a side (default: 384; 64 for shapes): the image tokenizer's size, or a larger one for "
        "encode_codes.py --crops 10; LlamaGen's is 1.1 times, 281 for 256 and 422 for 384",
    )
    parser.add_argument("--num-samples", type=positive, help="pictures to draw (--synthesize only; default 4096)")
    parser.add_argument("--samples-per-shard", type=positive, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the order, and of what is drawn")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes (default: cores)")
    parser.add_argument("--overwrite", action="store_true", help="replace another set in --out once the new one is made")
    options = parser.parse_args(arguments)
    if options.num_samples and not options.synthesize:
        parser.error("--num-samples goes with --synthesize; a folder or JSONL is taken whole")
    if options.seed < 0:
        parser.error(f"--seed must be at least 0, got {options.seed}")
    options.num_samples = options.num_samples or 4096
    options.image_size = options.image_size or (64 if options.synthesize else 384)
    try:
        make(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print("error: a worker process was killed, perhaps for lack of memory; try fewer --workers", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
