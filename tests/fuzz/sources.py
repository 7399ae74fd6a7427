"""Good tables, prompts files and tars of pictures, the ways to damage them, and their
readers.

One file is damaged in each case, and read by the command that a user would give. Every
row or sample must be read, or counted as left out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools import make_shards
from data_tools.pipeline import LEFT_OUT
from mmtensorar.data.shards import Manifest
from mmtensorar.generate import read_prompts
from tests.fuzz.damage import Damage, Rng, cut, flip_bits, insert, picture_of, png_bomb, remove

NUM_ROWS, SIDE = 6, 48
OUT = "made"
# Pillow's format, suffix and settings of each picture.
PICTURES = (
    ("JPEG", "jpg", {"quality": 90}),
    ("PNG", "png", {}),
    ("WEBP", "webp", {"quality": 90}),
    ("JPEG", "jpg", {"progressive": True}),
    ("WEBP", "webp", {"lossless": True}),
    ("JPEG", "jpg", {"restart_marker_rows": 1}),
)
TABLES = {
    "csv": ("list.csv", ("--csv",)),
    "tsv": ("list.tsv", ("--csv",)),
    "jsonl": ("list.jsonl", ("--jsonl",)),
    "parquet": ("list.parquet", ("--parquet",)),
    "tar": ("pictures.tar", ("--tars",)),
}
PROMPTS = "prompts.txt"

# ---- good files ------------------------------------------------------------------------------


def write_good(folder: Path) -> None:
    """A file of each kind, all about the same pictures."""
    import pyarrow
    from pyarrow import parquet

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names, contents = [], []
    for number, (kind, suffix, settings) in enumerate(PICTURES):
        content = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(content, kind, **settings)
        names.append(f"{number}.{suffix}")
        contents.append(content.getvalue())
        (folder / names[-1]).write_bytes(contents[-1])
    captions = [f"picture number {number}" for number in range(NUM_ROWS)]
    rows = list(zip(names, captions, strict=True))
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        lines = [("image", "caption"), *rows]
        (folder / f"list.{suffix}").write_text("".join(delimiter.join(line) + "\n" for line in lines))
    lines = [json.dumps({"image": name, "caption": caption}) for name, caption in rows]
    (folder / "list.jsonl").write_text("\n".join(lines) + "\n")
    (folder / PROMPTS).write_text("\n".join(captions) + "\n")
    columns = pyarrow.table({"image": contents, "caption": captions})
    parquet.write_table(columns, folder / "list.parquet", row_group_size=2, write_page_checksum=True)
    members = [
        (f"{Path(name).stem}{suffix}", content)
        for (name, caption), picture in zip(rows, contents, strict=True)
        for suffix, content in ((Path(name).suffix, picture), (".txt", caption.encode()))
    ]
    _write_tar(folder / "pictures.tar", members)


def _write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _read_tar(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


# ---- damage ----------------------------------------------------------------------------------

IN_LINE = (
    *(b'"', b'""', b'"a', b"'", b",", b"\t", b",,,", b"\0", b"\r", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf"),
    *("\u2028".encode(), "\x85".encode(), "\u200b".encode(), b"\x1b[2J", b"\\", b"{", b"}", b"[" * 5000),
    *(b"a" * 100_000, b"../../x.png", b"\\ud800", b"\\u0000", b'": "', b"null", b"1e999", b"pipe:ls"),
)


def in_a_line(content: bytes, rng: Rng) -> bytes:
    """Insert something into one line, or replace a part of it; no line is added."""
    lines = content.split(b"\n")
    number = int(rng.integers(len(lines) - 1))
    line, text = lines[number], IN_LINE[rng.integers(len(IN_LINE))]
    start = int(rng.integers(len(line) + 1))
    stop = start if rng.random() < 0.5 else int(rng.integers(start, len(line) + 1))
    lines[number] = line[:start] + text + line[stop:]
    return b"\n".join(lines)


def lose_the_end(content: bytes, rng: Rng) -> bytes:
    """What an interrupted download leaves: 10 to 90 %."""
    return content[: int(len(content) * rng.uniform(0.1, 0.9))]


def close_early(content: bytes, rng: Rng) -> bytes:
    """As `lose_the_end`, with the end marker of a JPEG or the end chunk of a PNG."""
    ends = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"\0\0\0\0IEND\xaeB`\x82"}
    return lose_the_end(content, rng) + ends.get(content[:2], b"")


def zero_the_end(content: bytes, rng: Rng) -> bytes:
    """What an interrupted download leaves that reserved the space."""
    kept = lose_the_end(content, rng)
    return kept + bytes(len(content) - len(kept))


INCOMPLETE = (lose_the_end, close_early, zero_the_end)


def damage(folder: Path, rng: Rng) -> Damage:
    """Change one file of the good ones. `what` starts with the kind of file."""
    kind = str(rng.choice(["csv", "tsv", "jsonl", "parquet", "prompts", "tar", "tar"]))
    if kind == "tar":
        return _damage_member(folder / "pictures.tar", rng)
    path = folder / (PROMPTS if kind == "prompts" else TABLES[kind][0])
    changes = [flip_bits, cut, insert, remove]
    if kind != "parquet":
        changes += [in_a_line] * 6
    change = changes[rng.integers(len(changes))]
    path.write_bytes(change(path.read_bytes(), rng))
    # A line of prompts that became blank is none. A row stays one, whatever is in it.
    left = NUM_ROWS if change is in_a_line and kind != "prompts" else _num_rows(path, kind)
    return Damage(f"{kind} {change.__name__}", left)


def _num_rows(path: Path, kind: str) -> int:
    """Rows that a reader must account for: those that can be counted without reading
    the file as it does.
    """
    if kind == "parquet":
        from pyarrow import ArrowException, parquet

        try:
            return parquet.ParquetFile(path).metadata.num_rows
        except (ArrowException, OSError, ValueError):
            return 0
    content = path.read_bytes()
    if kind in ("csv", "tsv") and b'"' in content:
        return 0  # quotes may join lines
    lines = content.decode(errors="replace").split("\n")
    num_rows = sum(bool(line.strip()) for line in lines)
    return max(0, num_rows - (kind in ("csv", "tsv")))


def _damage_member(path: Path, rng: Rng) -> Damage:
    members = _read_tar(path)
    number = int(rng.integers(NUM_ROWS)) * 2
    name, content = members[number]
    hostile = (png_bomb(60_000), png_bomb(0), picture_of("GIF", SIDE), picture_of("TIFF", SIDE), b"")
    if rng.random() < 0.1:
        members[number] = (name, hostile[rng.integers(len(hostile))])
        what, must_report = "replaced", False
    else:
        changes = (flip_bits, insert, remove, *INCOMPLETE, *INCOMPLETE)
        change = changes[rng.integers(len(changes))]
        members[number] = (name, change(content, rng))
        what, must_report = change.__name__, change in INCOMPLETE
    _write_tar(path, members)
    return Damage(f"tar {what} {name}", NUM_ROWS, must_report)


# ---- readers ---------------------------------------------------------------------------------


def read_table(folder: Path, kind: str, on_error: str) -> tuple[list[str], int]:
    """`mmtensorar shards make` on one file. Raises ValueError with its error."""
    name, option = TABLES[kind]
    out, err = io.StringIO(), io.StringIO()
    arguments = [*option, str(folder / name), "--out", str(folder / OUT), "--workers", "1"]
    arguments += ["--image-size", "16", "--on-error", on_error]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = make_shards.main(arguments)
    if code:
        errors = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
        if code != 2 or len(errors) != 1:
            raise RuntimeError(f"exit code {code} and {len(errors)} errors: {err.getvalue()[-2000:]}")
        if name not in errors[0] and OUT not in errors[0]:
            raise RuntimeError(f"a sentence that does not name the file: {errors[0]}")
        raise ValueError(f"{folder}: {errors[0]}")
    num_made = Manifest.read(folder / OUT).num_samples
    left_out = folder / OUT / LEFT_OUT
    num_left_out = len(left_out.read_text().splitlines()) if left_out.is_file() else 0
    return list(map(str, range(num_made))), num_left_out


def read_prompts_file(folder: Path) -> tuple[list[str], int]:
    """The prompts of `mmtensorar generate --prompts-file`."""
    options = argparse.Namespace(prompt=[], classes=[], prompts_file=folder / PROMPTS)
    return list(map(str, read_prompts(options))), 0


def readers() -> dict[str, Callable[[Path], tuple[list[str], int]]]:
    """Name -> reader. A name starts with the kind of file that it reads."""
    found: dict[str, Callable[[Path], tuple[list[str], int]]] = {"prompts": read_prompts_file}
    for kind in TABLES:
        for on_error in ("skip", "raise"):
            found[f"{kind}, {on_error}"] = partial(read_table, kind=kind, on_error=on_error)
    return found
