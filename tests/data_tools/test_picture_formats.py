"""Every source treats a kind of picture alike: what it reads, what it keeps, and what
it refuses.
"""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmtensorar.data.pictures import decode_picture, encoded_picture
from tests.helpers import pictures
from tests.helpers.pictures import encoded, photograph
from tests.helpers.sources import fails, made, make, write_tar

Files = dict[str, bytes]  # name of a picture -> its content


def written(folder: Path, files: Files) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def captioned(name: str) -> dict[str, str]:
    return {"image": name, "caption": f"a picture {name.split('.')[0]}"}


def folder(root: Path, files: Files) -> list:
    written(root / "in", files)
    for name in files:
        (root / "in" / name).with_suffix(".txt").write_text(captioned(name)["caption"])
    return ["--folder", root / "in"]


def class_folder(root: Path, files: Files) -> list:
    for name, content in files.items():
        written(root / "in" / name.split(".")[0], {name: content})
    return ["--class-folder", root / "in", "--class-template", "a picture {}"]


def jsonl(root: Path, files: Files) -> list:
    written(root / "in", files)
    (root / "in" / "rows.jsonl").write_text("".join(json.dumps(captioned(name)) + "\n" for name in files))
    return ["--jsonl", root / "in" / "rows.jsonl"]


def table(root: Path, files: Files) -> list:
    written(root / "in", files)
    with (root / "in" / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "caption"])
        writer.writeheader()
        writer.writerows(map(captioned, files))
    return ["--csv", root / "in" / "rows.csv"]


def parquet(root: Path, files: Files) -> list:
    import pyarrow.parquet

    captions = [captioned(name)["caption"] for name in files]
    rows = pyarrow.table({"image": list(files.values()), "caption": captions})
    pyarrow.parquet.write_table(rows, root / "rows.parquet")
    return ["--parquet", root / "rows.parquet"]


def dataset(root: Path, files: Files) -> list:
    import datasets

    captions = [captioned(name)["caption"] for name in files]
    images = [{"bytes": content, "path": None} for content in files.values()]
    rows = datasets.Dataset.from_dict({"image": images, "caption": captions})
    rows.cast_column("image", datasets.Image()).save_to_disk(root / "saved")
    return ["--dataset", root / "saved"]


def tars(root: Path, files: Files) -> list:
    members: Files = {}
    for name, content in files.items():
        members |= {name: content, f"{name.split('.')[0]}.txt": captioned(name)["caption"].encode()}
    (root / "in").mkdir()
    write_tar(root / "in" / "a.tar", members)
    return ["--tars", root / "in"]


SLOW = [pytest.param(source, marks=pytest.mark.slow) for source in (parquet, dataset)]  # large imports
SOURCES = [folder, class_folder, jsonl, table, tars, *SLOW]
every_source = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
Source = Callable[[Path, Files], list]


def found(out: Path) -> dict[str, dict[str, bytes]]:
    """Last word of the caption -> members of the sample."""
    return {sample.members["txt"].decode().split()[-1]: dict(sample.members) for sample in made(out)}


def pixels(members: dict[str, bytes]) -> np.ndarray:
    (content,) = (members[name] for name in ("jpg", "png", "webp") if name in members)
    return np.asarray(decode_picture(content, ""))


def mpo() -> bytes:
    """What cameras write who take two pictures at once."""
    first, second = photograph(16, 16, seed=1), Image.new("RGB", (16, 16), "blue")
    return encoded(first, "MPO", save_all=True, append_images=[second])


SQUARE = photograph(16, 16)
OTHERS = {
    "bmp.bmp": encoded(SQUARE, "BMP"),
    "gif.gif": encoded(SQUARE.quantize(), "GIF"),
    "tif.tif": encoded(SQUARE, "TIFF"),
    "tiff.tiff": encoded(SQUARE, "TIFF", compression="tiff_lzw"),
    "mpo.mpo": mpo(),
    "renamed.jpg": encoded(SQUARE, "BMP"),  # the content counts, not the name
}


# Other spellings of names.
SPELLED = {
    "jfif.jfif": encoded(SQUARE, "JPEG"),
    "jpe.JPE": encoded(SQUARE, "JPEG"),
    "apng.apng": encoded(SQUARE, "PNG"),
}


@every_source
def test_all_sources_read_the_same_formats(source: Source, tmp_path):
    """A folder used to leave BMP, GIF, TIFF and JFIF out, and a table of them to be an
    error.
    """
    files = OTHERS | SPELLED
    assert make(tmp_path / "set", *source(tmp_path, files), "--format", "png") == 0
    samples = found(tmp_path / "set")
    assert set(samples) == {name.split(".")[0] for name in files}
    for name, content in files.items():
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        np.testing.assert_array_equal(pixels(samples[name.split(".")[0]]), expected)


@every_source
def test_keep_keeps_pictures_of_shard_formats_and_makes_jpg_of_others(source: Source, tmp_path):
    """Pillow calls some cameras' JPEGs MPO, which used to be a KeyError with --format
    keep.
    """
    kept = {
        "camera.jpg": mpo(),
        "progressive.jpg": encoded(SQUARE, "JPEG", progressive=True),
        "grey.png": encoded(SQUARE.convert("L"), "PNG"),
        "w.webp": encoded(SQUARE, "WEBP"),
    }
    assert make(tmp_path / "set", *source(tmp_path, kept | OTHERS), "--format", "keep") == 0
    samples = found(tmp_path / "set")
    for name, content in kept.items():
        key, extension = name.split(".")
        assert samples[key][extension] == content
    assert samples["mpo"]["jpg"] == OTHERS["mpo.mpo"]
    for key in ("bmp", "gif", "tif", "tiff", "renamed"):
        assert samples[key]["jpg"].startswith(b"\xff\xd8\xff")
    np.testing.assert_array_equal(pixels(samples["camera"]), np.asarray(Image.open(io.BytesIO(mpo()))))


REFUSED = {
    "jpeg2000.jpg": encoded(SQUARE, "JPEG2000"),
    "ppm.png": encoded(SQUARE, "PPM"),
    "ico.png": encoded(SQUARE, "ICO"),
    "page.jpg": b"<!DOCTYPE html><title>Not found</title>",
}
LARGE = photograph()
DAMAGED = {
    "closed.jpg": pictures.closed(encoded(LARGE, "JPEG")),
    "zeroed.jpg": pictures.zeroed(encoded(LARGE, "JPEG", optimize=True)),
    "blurred.jpg": pictures.closed(encoded(LARGE, "JPEG", progressive=True)),
    "zeroed-png.png": pictures.zeroed(encoded(LARGE, "PNG")),
    "zeroed-webp.webp": pictures.zeroed(encoded(LARGE, "WEBP", quality=90)),
}


@every_source
def test_all_sources_leave_out_the_same(source: Source, tmp_path, capsys):
    """Each is counted, named, and has its reason in left_out.jsonl."""
    bad, good = REFUSED | DAMAGED, {"good.jpg": encoded(LARGE, "JPEG")}
    assert make(tmp_path / "set", *source(tmp_path, bad | good), "--on-error", "skip") == 0
    assert set(found(tmp_path / "set")) == {"good"}
    lines = (tmp_path / "set" / "left_out.jsonl").read_text().splitlines()
    assert len(lines) == len(bad) and all("unreadable image (" in line for line in lines)
    assert f"left out {len(bad)} of {len(bad) + 1}" in capsys.readouterr().out


@every_source
@pytest.mark.parametrize("name", ["closed.jpg", "zeroed-webp.webp", "ppm.png"])
def test_without_skip_the_first_is_an_error(source: Source, name, tmp_path, capsys):
    arguments = source(tmp_path, {name: (REFUSED | DAMAGED)[name]})
    capsys.readouterr()
    assert "unreadable image (" in fails(capsys, make(tmp_path / "set", *arguments))


def test_a_preview_next_to_a_picture_in_a_tar_is_counted_as_left_out(tmp_path, capsys):
    members = {"a.jpg": encoded(SQUARE, "JPEG"), "a.gif": OTHERS["gif.gif"], "a.txt": b"a"}
    write_tar(tmp_path / "a.tar", members)
    assert make(tmp_path / "set", "--tars", tmp_path / "a.tar", "--format", "keep") == 0
    assert "left out members of other kinds: 1 .gif" in capsys.readouterr().err
    (sample,) = made(tmp_path / "set")
    assert encoded_picture(sample, "") == members["a.jpg"]
