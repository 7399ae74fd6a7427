"""Damage good shards in many ways and see that every reader says so: `python -m tests.fuzz.fuzz --seconds 60`.

Each case takes a good set, changes one of its files (bits, lengths, tar headers, names, arrays, pictures, captions, the manifest)
and has each reader read it. A reader has to give every sample back, or to name the damaged file in one sentence (a ValueError), or,
where it skips, to count what is missing. Anything else is a failure: another exception, a process that dies, hangs or takes a lot
of memory, and samples that are gone without a word. Exit code 1 when there was one. Case i of a seed is always the same.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tarfile
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_tools import inspect_shards, sources
from data_tools.check_shards import check_shard
from data_tools.encode_codes import pictures
from data_tools.samples import Wanted, make_sample
from mmtensorar.data.shards import (
    MANIFEST,
    Codes,
    Manifest,
    Sample,
    TextFeatures,
    encode_codes,
    encode_features,
    iterate_shard,
    write_tar,
)

NUM_SHARDS, PER_SHARD, SIDE, NUM_CODES = 2, 4, 4, 64
TIME_LIMIT_S, MEMORY_LIMIT = 10.0, 2**31
BAD = ("crash", "hang", "memory", "silent loss")


class Verdict(NamedTuple):
    """kind: refused, unharmed, changed, skipped, or one of BAD. detail: the sentence, or what went wrong."""

    kind: str
    detail: str = ""


# ---- a good set ------------------------------------------------------------------------------


def write_good(folder: Path) -> None:
    """Shards with all kinds of members."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    shards = []
    for number in range(NUM_SHARDS):
        samples = []
        for place in range(PER_SHARD):
            picture = io.BytesIO()
            kind = ("JPEG", "PNG", "WEBP")[place % 3]
            exif = Image.Exif()
            exif[0x0112], exif[0x010E] = 6, "held upright"  # orientation, description
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(picture, kind, exif=exif)
            extension = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind]
            codes = rng.integers(0, NUM_CODES, (1, SIDE * SIDE, 1)).astype(np.uint16)
            members = {
                extension: picture.getvalue(),
                "txt": f"picture {number} {place}".encode(),
                "json": b'{"source": "fuzz"}',
                "codes.npy": encode_codes(codes),
                "t5.npy": encode_features(rng.normal(size=(3, 8)).astype(np.float16)),
            }
            samples.append(Sample(f"{number}{place}", members))
        shards.append(write_tar(folder / f"{number:05d}.tar", samples))
    Manifest(
        shards=tuple(shards),
        num_samples=NUM_SHARDS * PER_SHARD,
        image_size=16,
        codes=Codes(
            image_tokenizer="fuzz",
            weight_hash="0" * 64,
            grid=(SIDE, SIDE),
            factor_sizes=(NUM_CODES,),
            crops=1,
        ),
        text_features=TextFeatures(
            text_encoder="fuzz", weight_hash="0" * 64, width=8, max_tokens=3, cleaning="none"
        ),
        source="fuzz",
        seed=0,
    ).write(folder)


# ---- what is done to it ----------------------------------------------------------------------

Rng = np.random.Generator


def flip_bits(content: bytes, rng: Rng) -> bytes:
    found = np.frombuffer(content, np.uint8).copy()
    places = rng.integers(0, len(found), rng.integers(1, 50))
    found[places] ^= (1 << rng.integers(0, 8, len(places))).astype(np.uint8)
    return found.tobytes()


def cut(content: bytes, rng: Rng) -> bytes:
    return content[: rng.integers(0, len(content))]


def insert(content: bytes, rng: Rng) -> bytes:
    place = int(rng.integers(0, len(content)))
    return content[:place] + rng.bytes(int(rng.integers(1, 2000))) + content[place:]


def remove(content: bytes, rng: Rng) -> bytes:
    place = int(rng.integers(0, len(content)))
    return content[:place] + content[place + int(rng.integers(1, 2000)) :]


def shuffle_blocks(content: bytes, rng: Rng) -> bytes:
    """Tar blocks swapped, zeroed or doubled."""
    blocks = [content[start : start + 512] for start in range(0, len(content), 512)]
    one, two = rng.integers(0, len(blocks), 2)
    choice = rng.integers(3)
    if choice == 0:
        blocks[one], blocks[two] = blocks[two], blocks[one]
    elif choice == 1:
        blocks[one] = bytes(512)
    else:
        blocks.insert(one, blocks[two])
    return b"".join(blocks)


def _headers(content: bytes) -> list[int]:
    return [start for start in range(0, len(content), 512) if content[start + 257 : start + 262] == b"ustar"]


def _with_checksum(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}".encode() + b"\0 "
    return bytes(header)


def change_header(content: bytes, rng: Rng) -> bytes:
    """Another size, kind, name or checksum in one header, whose checksum is right in most cases."""
    start = int(rng.choice(_headers(content)))
    header = bytearray(content[start : start + 512])
    choice = rng.integers(4)
    if choice == 0:
        sizes = (
            b"77777777777\0",
            b"-0000000001\0",
            b"\x80" + b"\xff" * 11,
            b"\xff" * 12,
            b"00000000000\0",
            b"zzzzzzzzzzz\0",
        )
        header[124:136] = sizes[rng.integers(len(sizes))]
    elif choice == 1:
        header[156:157] = b"0\x001234567xgLKSVMN"[i : i + 1] if (i := int(rng.integers(18))) < 17 else b"\xff"
    elif choice == 2:
        names = (
            b"../../x.txt",
            b"/etc/passwd",
            b"a\\b.txt",
            b"\xff\xfe.txt",
            b"x.pkl",
            b"x.codes.pth",
            b"x.pyd",
            b"x.exe",
            b"",
            b".txt",
            b"x",
            b"a" * 100,
            b"pipe:ls.txt",
        )
        header[:100] = names[rng.integers(len(names))].ljust(100, b"\0")
    else:
        header[int(rng.integers(512))] = int(rng.integers(256))
    if rng.random() < 0.8:
        header = _with_checksum(header)
    return content[:start] + bytes(header) + content[start + 512 :]


def extended_header(content: bytes, rng: Rng) -> bytes:
    """A pax or GNU header before a member: long names, huge sizes, broken records, or hundreds of them."""
    start = int(rng.choice(_headers(content)))
    records = (
        b"30 path=../../../../etc/passw\n",
        b"22 size=999999999999999\n",
        b"12 size=-10\n",
        b"999999 path=x\n",
        b"x path=x\n",
        b"21 GNU.sparse.size=99\n",
        b"",
        b"0 =\n",
        rng.bytes(100),
    )
    body = records[rng.integers(len(records))]
    header = bytearray(512)
    header[:4] = b"@PAX"
    header[100:108], header[108:116], header[116:124] = (b"0000644\0",) * 3
    length = len(body) if rng.random() < 0.7 else int(rng.choice([2**33 - 1, 2**20, 100]))
    header[124:136] = f"{length:011o}".encode() + b"\0"
    header[136:148] = b"00000000000\0"
    header[156:157] = (b"x", b"g", b"L", b"K")[rng.integers(4)]
    header[257:265] = b"ustar\00000"
    one = _with_checksum(header) + body.ljust(-(-len(body) // 512) * 512, b"\0")
    return content[:start] + one * int(rng.choice([1, 2, 500])) + content[start:]


TAR_CHANGES = (
    flip_bits,
    flip_bits,
    cut,
    insert,
    remove,
    shuffle_blocks,
    change_header,
    change_header,
    extended_header,
)


def png_bomb(side: int) -> bytes:
    """A PNG that announces side x side pixels, without them."""
    content = io.BytesIO()
    Image.new("RGB", (1, 1)).save(content, "PNG")
    found = bytearray(content.getvalue())
    found[16:24] = side.to_bytes(4, "big") * 2
    found[29:33] = zlib.crc32(bytes(found[12:29])).to_bytes(4, "big")
    return bytes(found)


def picture_of(kind: str, side: int = 16) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(content, kind)
    return content.getvalue()


def npy(header: str) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def other_members(samples: list[Sample], rng: Rng) -> list[Sample]:
    """Members that are there, and mean harm."""
    arrays = (
        npy("{'descr': '<u2', 'fortran_order': False, 'shape': (1, 99999999999, 1)}"),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}") + b"cos\nsystem\n(S'false'\ntR.",
        npy("{'descr': '<u2', 'fortran_order': False, 'shape': (-1, 16, 1)}") + bytes(32),
        npy("__import__('os').system('false')"),
        npy("(" * 5000),
        npy("{'descr': '<u2', 'fortran_order': False, 'shape': (%d, 1, 1)}" % 10**30),
        npy("{'descr': '<u2', 'fortran_order': False, 'shape': (%s,)}" % "+".join("1" * 4000)),
        npy("{'descr': '<u2', 'fortran_order': True, 'shape': (1, 16, 1)}") + bytes(32),
        npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1, 16, 1)}") + bytes(128),
        b"\x93NUMPY\x09\x00",
        b"\x93NUMPY\x03\x00\xff\xff\xff\xff",
        b"PK\x03\x04",
        b"\x80\x04.",
        b"",
        encode_codes(np.full((1, SIDE * SIDE, 1), 65535, np.uint16)),
        encode_codes(np.zeros((0, SIDE * SIDE, 1), np.uint16)),
        encode_features(np.full((3, 8), np.inf, np.float16)),
        encode_features(np.zeros((0, 8), np.float16)),
    )
    pictures = (
        png_bomb(60_000),
        png_bomb(9_000),
        png_bomb(0),
        picture_of("GIF"),
        picture_of("TIFF"),
        picture_of("BMP"),
        picture_of("PNG", 17),
        b"\xff\xd8\xff",
        b"8BPS\0\1" + bytes(100),
        b"%!PS-Adobe",
        b"",
    )
    texts = (
        b"[" * 100_000,
        b"1" * 60_000,
        b"\xff\xfe",
        b"",
        b" ",
        b"\0",
        b'{"a": 1e999}',
        b'"' + b"\\ud800" * 1000 + b'"',
    )
    number = int(rng.integers(len(samples)))
    members = dict(samples[number].members)
    extension = list(members)[rng.integers(len(members))]
    pool = arrays if extension.endswith("npy") else texts if extension in ("txt", "json") else pictures
    choice = rng.integers(5)
    if choice < 3:
        members[extension] = pool[rng.integers(len(pool))]
    elif choice == 3:
        members[extension] = (flip_bits, cut, insert)[rng.integers(3)](members[extension], rng)
    else:
        del members[extension]
    return [*samples[:number], Sample(samples[number].key, members), *samples[number + 1 :]]


def other_samples(samples: list[Sample], rng: Rng) -> list[Sample]:
    """Samples swapped, doubled, missing, with members of each other."""
    one, two = rng.integers(0, len(samples), 2)
    found = list(samples)
    choice = rng.integers(4)
    if choice == 0:
        found[one], found[two] = found[two], found[one]
    elif choice == 1:
        found.append(samples[one])
    elif choice == 2:
        del found[one]
    else:
        found[one] = Sample(samples[one].key, samples[two].members)
    return found


def change_manifest(content: bytes, rng: Rng) -> bytes:
    choice = rng.integers(6)
    if choice == 0:
        return (flip_bits, cut, insert, remove)[rng.integers(4)](content, rng)
    if choice == 1:
        return b"[" * 100_000
    found = json.loads(content)
    values = (
        0,
        -1,
        10**30,
        1.5,
        None,
        "x",
        [],
        {},
        True,
        "../x.tar",
        "pipe:ls",
        "0" * 64,
        [[[]]],
        [2**40, 2**40],
    )
    value = values[rng.integers(len(values))]
    places: list[tuple] = [(found, key) for key in found]
    places += [(shard, key) for shard in found["shards"] for key in shard]
    places += [(found["codes"], key) for key in found["codes"]] + [
        (found["text_features"], key) for key in found["text_features"]
    ]
    where, key = places[rng.integers(len(places))]
    if choice == 2:
        del where[key]
    else:
        where[key] = value
    return json.dumps(found).encode()


def _write_unchecked(path: Path, samples: list[Sample]) -> None:
    """A well-formed tar with members that write_tar refuses."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for extension, content in sample.members.items():
                member = tarfile.TarInfo(f"{sample.key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


class Damage(NamedTuple):
    """what was done to which file. left: samples that a reader without the manifest can know of."""

    what: str
    left: int = NUM_SHARDS * PER_SHARD


def damage(folder: Path, rng: Rng) -> Damage:
    """Change one file of a good set."""
    kind = rng.choice(["tar", "tar", "tar", "members", "members", "samples", "manifest", "other file"])
    if kind == "manifest":
        path = folder / MANIFEST
        path.write_bytes(change_manifest(path.read_bytes(), rng))
        return Damage(MANIFEST)
    path = folder / f"{int(rng.integers(NUM_SHARDS)):05d}.tar"
    if kind == "tar":
        change = TAR_CHANGES[rng.integers(len(TAR_CHANGES))]
        path.write_bytes(change(path.read_bytes(), rng))
        return Damage(f"{change.__name__} {path.name}")
    if kind == "other file":
        others = (
            b"",
            b"\x1f\x8b" + rng.bytes(100),
            bytes(1024),
            bytes(10**6),
            rng.bytes(5000),
            picture_of("PNG"),
        )
        path.write_bytes(others[rng.integers(len(others))])
        return Damage(f"other file {path.name}", (NUM_SHARDS - 1) * PER_SHARD)
    manifest = Manifest.read(folder)
    shard = next(shard for shard in manifest.shards if shard.name == path.name)
    change = other_members if kind == "members" else other_samples
    samples = change(list(iterate_shard(folder, shard)), rng)
    _write_unchecked(path, samples)
    left = len({sample.key for sample in samples if sample.members})
    return Damage(f"{change.__name__} {path.name}", (NUM_SHARDS - 1) * PER_SHARD + left)


# ---- who reads it ----------------------------------------------------------------------------

Found = tuple[list[str], int]  # captions that came, and how many samples were told to be missing


def read_check(folder: Path) -> Found:
    """check_shards: every sample is there or somewhere in the problems."""
    manifest = Manifest.read(folder, complete=False)
    captions, missing = [], 0
    for shard in manifest.shards:
        checked = check_shard(folder, shard, manifest)
        if checked.problems:
            missing += PER_SHARD  # it is told that the shard is bad, and how
        captions += [read.key for read in checked.read]
    return captions, missing


def read_iterate(folder: Path) -> Found:
    """The reader of encode_codes and encode_text."""
    manifest = Manifest.read(folder)
    return [sample.key for shard in manifest.shards for sample in iterate_shard(folder, shard)], 0


def read_pictures(folder: Path) -> Found:
    """What encode_codes decodes."""
    manifest, found = Manifest.read(folder), []
    for shard in manifest.shards:
        samples = iterate_shard(folder, shard)
        for batch, images in pictures(
            samples, folder / shard.name, image_size=manifest.image_size, batch_size=3, threads=1
        ):
            found += [
                sample.key for sample, image in zip(batch, images, strict=True) if image.size == (16, 16)
            ]
    return found, 0


def read_inspect(folder: Path) -> Found:
    manifest = Manifest.read(folder)
    found = inspect_shards.count(folder, manifest)
    inspect_shards.facts(folder, manifest, found)
    inspect_shards.histograms(found)
    inspect_shards.page(folder, manifest, found, 8)
    return [str(number) for number in range(len(found.words))], 0


def _stream(folder: Path, on_error: str) -> Found:
    from mmtensorar.data import loader
    from mmtensorar.recipe import Data, Run, Train

    total = NUM_SHARDS * PER_SHARD
    settings = Data(
        shards=str(folder), batch_size=total, shuffle=4, text_features="cached", on_error=on_error
    )
    recipe = SimpleNamespace(run=Run(name="fuzz"), data=settings, train=Train(steps=1))
    captions, skipped = [], 0
    for batch in islice(loader.stream(recipe, None, rank=0, world_size=1), 1):
        captions += batch.names
        skipped += len(batch.skipped)
    return list(dict.fromkeys(captions)), skipped


def read_stream(folder: Path) -> Found:
    return _stream(folder, "raise")


def read_skipping(folder: Path) -> Found:
    return _stream(folder, "skip")


def read_source(folder: Path) -> Found:
    """make_shards --tars."""
    found, missing = [], 0
    for number, item in enumerate(sources.items("tars", str(folder), sources.Layout())):
        try:
            found.append(
                make_sample(
                    f"{number}", item._replace(captions=item.captions[:1]), Wanted(image_size=16)
                ).sample.key
            )
        except ValueError:
            missing += 1
    return found, missing


READERS: dict[str, Callable[[Path], Found]] = {
    "check_shards": read_check,
    "encode_*": read_iterate,
    "encode_codes, pictures": read_pictures,
    "inspect_shards": read_inspect,
    "training": read_stream,
    "training, skip": read_skipping,
    "make_shards --tars": read_source,
}


def judge(read: Callable[[Path], Found], folder: Path, expected: int, is_changed: bool) -> Verdict:
    """What a reader makes of a folder in which there are so many samples, of which some may be damaged."""
    try:
        found, told = read(folder)
    except ValueError as error:
        sentence = str(error)
        if str(folder) not in sentence or "\n" in sentence:
            return Verdict("crash", f"a sentence that does not name the file: {sentence[:300]}")
        return Verdict("refused", sentence)
    except MemoryError:
        return Verdict("memory")
    except Exception:  # what is looked for
        return Verdict("crash", traceback.format_exc())
    if len(found) + told < expected:
        return Verdict("silent loss", f"{len(found)} samples and {told} told, of {expected}")
    if told:
        return Verdict("skipped")
    return Verdict("changed" if is_changed else "unharmed")


# ---- cases, each in a child process ----------------------------------------------------------


def run_case(
    good: Path, work: Path, seed: int, case: int, readers: dict[str, Callable[[Path], Found]]
) -> list[tuple]:
    """(reader, what was done, verdict) of each reader on one case."""
    rng = np.random.default_rng([seed, case])
    folder = work / "set"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    done = damage(folder, rng)
    changed = any((folder / path.name).read_bytes() != path.read_bytes() for path in good.iterdir())
    found = []
    for name, read in readers.items():
        expected = _announced(folder)
        if "--tars" in name:  # tars alone do not say how many samples there were
            expected = min(done.left, NUM_SHARDS * PER_SHARD)
        found.append((name, done.what, judge(read, folder, expected, changed)))
    return found


def _announced(folder: Path) -> int:
    try:
        return min(Manifest.read(folder).num_samples, NUM_SHARDS * PER_SHARD)
    except (ValueError, OSError):
        return 0


def serve(pipe, good: Path, work: Path, seed: int, readers: dict[str, Callable[[Path], Found]]) -> None:
    """A child: runs the cases that come through the pipe."""
    import torch  # noqa: F401  before memory is limited

    from mmtensorar.data import loader  # noqa: F401

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a source's notes, of every case
    work.mkdir(parents=True, exist_ok=True)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_LIMIT,) * 2)
    pipe.send(None)
    while (case := pipe.recv()) is not None:
        try:
            pipe.send(run_case(good, work, seed, case, readers))
        except Exception:  # not a reader's fault, but to be seen all the same
            pipe.send(Verdict("crash", f"of the fuzzer itself: {traceback.format_exc()}"))


class Child:
    def __init__(self, good: Path, work: Path, seed: int, readers: dict[str, Callable[[Path], Found]]):
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("fork").Process(
            target=serve, args=(theirs, good, work, seed, readers), daemon=True
        )
        self.process.start()
        theirs.close()
        self.pipe.recv()

    def run(self, case: int, limit_s: float) -> list[tuple] | Verdict:
        self.pipe.send(case)
        try:
            if self.pipe.poll(limit_s):
                return self.pipe.recv()
        except EOFError:
            self.process.join(5)
            return Verdict("crash", f"the process died with exit code {self.process.exitcode}")
        return Verdict("hang", f"no answer in {limit_s:g} s")

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def fuzz(
    seed: int,
    *,
    seconds: float = float("inf"),
    cases: range | None = None,
    readers: dict[str, Callable[[Path], Found]] = READERS,
    limit_s: float = TIME_LIMIT_S,
    keep: Path | None = None,
) -> tuple[Counter[tuple[str, str]], list[str], int]:
    """Counts of (reader, verdict), the failures in words, and how many cases were tried."""
    counts: Counter[tuple[str, str]] = Counter()
    failures: list[str] = []
    tried, deadline = 0, time.monotonic() + seconds
    with (
        tempfile.TemporaryDirectory() as temporary,
        tqdm(desc="fuzzing", unit=" cases", disable=None) as progress,
    ):
        good, work = Path(temporary) / "good", Path(temporary) / "work"
        write_good(good)
        child = Child(good, work, seed, readers)
        for case in cases if cases is not None else iter(range(10**12)):
            if time.monotonic() > deadline:
                break
            found = child.run(case, limit_s)
            if isinstance(found, Verdict):  # the child is no use any more
                child.stop()
                child = Child(good, work, seed, readers)
                found = [("a reader", "?", found)]
            for name, done, verdict in found:
                counts[name, verdict.kind] += 1
                if verdict.kind in BAD:
                    failures.append(
                        f"case {case} of seed {seed}, {done}, {name}: {verdict.kind}: {verdict.detail}"
                    )
                    if keep is not None and (work / "set").is_dir():
                        shutil.copytree(work / "set", keep / f"{seed}-{case}", dirs_exist_ok=True)
            tried += 1
            progress.update(1)
        child.stop()
    return counts, failures, tried


def table(counts: Counter[tuple[str, str]]) -> str:
    kinds = ("unharmed", "changed", "refused", "skipped", *BAD)
    lines = [f"| reader | {' | '.join(kinds)} |", f"|---|{'---:|' * len(kinds)}"]
    for name in dict.fromkeys(name for name, _ in counts):
        lines.append(f"| {name} | {' | '.join(str(counts[name, kind]) for kind in kinds)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only this one")
    parser.add_argument("--keep", type=Path, help="folder for the sets at which a reader failed")
    options = parser.parse_args(arguments)
    if options.seconds <= 0 or options.seed < 0 or (options.case is not None and options.case < 0):
        parser.error("--seconds must be above 0, --seed and --case at least 0")
    cases = None if options.case is None else range(options.case, options.case + 1)
    began = time.monotonic()
    counts, failures, tried = fuzz(options.seed, seconds=options.seconds, cases=cases, keep=options.keep)
    print(
        f"{tried} cases, {tried / (time.monotonic() - began):.0f} a second, each read by {len(READERS)} readers\n"
    )
    print(table(counts))
    for failure in failures[:20]:
        print(f"\n{failure}", file=sys.stderr)
    print(f"\n{len(failures) or 'no'} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
