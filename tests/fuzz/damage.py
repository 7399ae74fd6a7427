"""A good set with all kinds of members, and the ways to damage it."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mmtensorar.data.members import encode_codes, encode_features
from mmtensorar.data.shards import (
    MANIFEST,
    Codes,
    Manifest,
    Sample,
    TextFeatures,
    iterate_shard,
    write_tar,
)

NUM_SHARDS, PER_SHARD, SIDE, NUM_CODES = 2, 4, 4, 64

# ---- a good set ------------------------------------------------------------------------------


def write_good(folder: Path) -> None:
    """Shards with all kinds of members."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    shards = []
    for number in range(NUM_SHARDS):
        samples = []
        for index in range(PER_SHARD):
            picture = io.BytesIO()
            kind = ("JPEG", "PNG", "WEBP")[index % 3]
            exif = Image.Exif()
            exif[0x0112], exif[0x010E] = 6, "held upright"  # orientation, description
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(picture, kind, exif=exif)
            extension = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind]
            codes = rng.integers(0, NUM_CODES, (1, SIDE * SIDE, 1)).astype(np.uint16)
            members = {
                extension: picture.getvalue(),
                "txt": f"picture {number} {index}".encode(),
                "json": b'{"source": "fuzz"}',
                "codes.npy": encode_codes(codes),
                "t5.npy": encode_features(rng.normal(size=(3, 8)).astype(np.float16)),
            }
            samples.append(Sample(f"{number}{index}", members))
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


# ---- damage ----------------------------------------------------------------------------------

Rng = np.random.Generator


def flip_bits(content: bytes, rng: Rng) -> bytes:
    changed = np.frombuffer(content, np.uint8).copy()
    offsets = rng.integers(0, len(changed), rng.integers(1, 50))
    changed[offsets] ^= (1 << rng.integers(0, 8, len(offsets))).astype(np.uint8)
    return changed.tobytes()


def cut(content: bytes, rng: Rng) -> bytes:
    return content[: rng.integers(0, len(content))]


def insert(content: bytes, rng: Rng) -> bytes:
    offset = int(rng.integers(0, len(content)))
    return content[:offset] + rng.bytes(int(rng.integers(1, 2000))) + content[offset:]


def remove(content: bytes, rng: Rng) -> bytes:
    offset = int(rng.integers(0, len(content)))
    return content[:offset] + content[offset + int(rng.integers(1, 2000)) :]


def shuffle_blocks(content: bytes, rng: Rng) -> bytes:
    """Swap, zero or duplicate tar blocks."""
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
    """Change size, type, name or checksum in one header.

    Usually the checksum is corrected afterwards.
    """
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
    """Put a pax or GNU header before a member: a long name, a huge size, broken
    records, or hundreds of headers.
    """
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
    """A PNG whose header announces side x side pixels that it does not have."""
    content = io.BytesIO()
    Image.new("RGB", (1, 1)).save(content, "PNG")
    png = bytearray(content.getvalue())
    png[16:24] = side.to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(bytes(png[12:29])).to_bytes(4, "big")
    return bytes(png)


def picture_of(kind: str, side: int = 16) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(content, kind)
    return content.getvalue()


def npy(header: str) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def other_members(samples: list[Sample], rng: Rng) -> list[Sample]:
    """Replace, damage or remove one member; replacements are hostile."""
    arrays = (
        npy("{'descr': '<u2', 'fortran_order': False, 'shape': (1, 99999999999, 1)}"),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}") + b"cos\nsystem\n(S'false'\ntR.",
        npy("{'descr': '<u2', 'fortran_order': False, 'shape': (-1, 16, 1)}") + bytes(32),
        npy("__import__('os').system('false')"),
        npy("(" * 5000),
        npy(f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({10**30}, 1, 1)}}"),
        npy(f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({'+'.join('1' * 4000)},)}}"),
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
    """Swap, duplicate or remove samples, or give one sample the members of another."""
    one, two = rng.integers(0, len(samples), 2)
    changed = list(samples)
    choice = rng.integers(4)
    if choice == 0:
        changed[one], changed[two] = changed[two], changed[one]
    elif choice == 1:
        changed.append(samples[one])
    elif choice == 2:
        del changed[one]
    else:
        changed[one] = Sample(samples[one].key, samples[two].members)
    return changed


def change_manifest(content: bytes, rng: Rng) -> bytes:
    choice = rng.integers(6)
    if choice == 0:
        return (flip_bits, cut, insert, remove)[rng.integers(4)](content, rng)
    if choice == 1:
        return b"[" * 100_000
    manifest = json.loads(content)
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
    fields: list[tuple] = [(manifest, key) for key in manifest]
    fields += [(shard, key) for shard in manifest["shards"] for key in shard]
    fields += [(manifest["codes"], key) for key in manifest["codes"]]
    fields += [(manifest["text_features"], key) for key in manifest["text_features"]]
    section, key = fields[rng.integers(len(fields))]
    if choice == 2:
        del section[key]
    else:
        section[key] = value
    return json.dumps(manifest).encode()


def _write_unchecked(path: Path, samples: list[Sample]) -> None:
    """A well-formed tar with members that write_tar refuses."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for extension, content in sample.members.items():
                member = tarfile.TarInfo(f"{sample.key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


class Damage(NamedTuple):
    """The damage and the file that was damaged.

    left: number of samples that a reader without the manifest can know of. must_report:
    the damage must be reported.
    """

    what: str
    left: int = NUM_SHARDS * PER_SHARD
    must_report: bool = False


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
