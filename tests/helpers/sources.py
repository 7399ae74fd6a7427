"""Sources of one-colour pictures, and the sets of shards made from them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools import make_shards
from mmtensorar.data import shards
from mmtensorar.data.pictures import sample_picture
from mmtensorar.data.shards import Manifest, iterate_tar

COLORS = ("red", "lime", "blue", "white", "black", "yellow")


def make(out: Path, *arguments: object) -> int:
    return make_shards.main(["--image-size", "16", "--workers", "1", *map(str, arguments), "--out", str(out)])


def made(out: Path) -> list[shards.Sample]:
    return [sample for shard in Manifest.read(out).shards for sample in iterate_tar(out / shard.name)]


def captions(out: Path) -> list[str]:
    return sorted(sample.members["txt"].decode() for sample in made(out))


def fields(out: Path) -> dict:
    """The other fields of the first sample's row."""
    return json.loads(json.loads(made(out)[0].members["json"])["fields"])


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def fails(capsys, code: int) -> str:
    sentence = capsys.readouterr().err
    assert code == 2 and sentence.startswith("error: ") and sentence.count("\n") == 1, sentence
    return sentence


def picture(color: str, size: tuple[int, int] = (20, 20), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind)
    return buffer.getvalue()


def assert_right(out: Path, colors=COLORS) -> None:
    """Assert that every picture occurs once, with the caption that names its colour."""
    found = made(out)
    assert sorted(sample.members["txt"].decode() for sample in found) == sorted(
        f"a {color} picture" for color in colors
    )
    for sample in found:
        expected = Image.new("RGB", (1, 1), sample.members["txt"].decode().split()[1]).getpixel((0, 0))
        image = sample_picture(sample, sample.key, 16)
        assert np.abs(np.subtract(image.getpixel((8, 8)), expected)).max() <= 4


def write_tar(path: Path, members: dict[str, bytes], kinds: dict[str, bytes] | None = None) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, value in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.type = len(value), (kinds or {}).get(name, tarfile.REGTYPE)
            tar.addfile(info, io.BytesIO(value))
    return path
