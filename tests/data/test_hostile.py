"""Harmful files, given to every reader: nothing in them is executed, and nothing is
written outside the set.
"""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mmtensorar.data.shards import Manifest
from mmtensorar.files import sha256
from tests.fuzz import fuzz


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def array_of_objects(mark: Path) -> bytes:
    content = io.BytesIO()
    np.save(content, np.array([Payload(mark)], dtype=object), allow_pickle=True)
    return content.getvalue()


# Name of the member -> its content. A name with {key} belongs to the first sample.
MEMBERS = {
    "{key}.pkl": lambda mark: pickle.dumps(Payload(mark)),
    "{key}.pyd": lambda mark: pickle.dumps(Payload(mark)),
    "{key}.pth": lambda mark: pickle.dumps(Payload(mark)),
    "{key}.codes.npy": array_of_objects,
    "{key}.t5.npy": array_of_objects,
    "{key}.codes.pth": lambda mark: pickle.dumps(Payload(mark)),
    "../../escaped.txt": lambda mark: b"a caption",
    "/tmp/escaped.txt": lambda mark: b"a caption",
    "{key}.json": lambda mark: b'"' + b"x" * 2**20 + b'"',
    "{key}.txt": lambda mark: b"x" * (2**16 + 1),
}


def with_member(folder: Path, name: str, content: bytes) -> None:
    """Put a member into the first sample of a good set, in place of one of its
    members.
    """
    path = folder / "00000.tar"
    with tarfile.open(path) as tar:
        found = [(member, tar.extractfile(member).read()) for member in tar]
    key = found[0][0].name.partition(".")[0]
    name = name.format(key=key)
    found = [(member, old) for member, old in found if member.name != name]
    found.insert(1, (tarfile.TarInfo(name), content))
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, old in found:
            member.size = len(old)
            tar.addfile(member, io.BytesIO(old))
    manifest = Manifest.read(folder)
    shard = manifest.shards[0].model_copy(update={"sha256": sha256(path)})
    manifest.model_copy(update={"shards": (shard, *manifest.shards[1:])}).write(folder)


def readers() -> list:
    """All readers. Only the training loader is in the fast tier."""
    slow = {name: [] if name == "training" else [pytest.mark.slow] for name in fuzz.READERS}
    return [pytest.param(name, marks=marks) for name, marks in slow.items()]


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("reader", readers())
def test_hostile_input_is_refused_and_has_no_effect(tmp_path, monkeypatch, name, reader):
    folder, mark = tmp_path / "a" / "b" / "set", tmp_path / "mark"
    folder.parent.mkdir(parents=True)
    fuzz.write_good(folder)
    content = MEMBERS[name](mark)
    if content[:2] == b"\x80\x04":  # shows that this payload works
        pickle.loads(content)
        mark.rmdir()
    with_member(folder, name, content)
    before = {path for path in tmp_path.rglob("*")}
    whole = fuzz.NUM_SHARDS * fuzz.PER_SHARD
    try:
        found, told = fuzz.READERS[reader](folder)
    except ValueError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
    else:  # the reader skips the sample, or ignores the member, and returns all other samples
        assert len(found) + told >= whole
    assert not mark.exists() and {path for path in tmp_path.rglob("*")} == before
    assert not Path("/tmp/escaped.txt").exists()


@pytest.mark.parametrize(
    "place", ["pipe:touch {mark}", "pipe:touch {mark} |.tar", "file://{mark}", "ftp://host/set"]
)
def test_no_location_runs_a_command(tmp_path, place, monkeypatch, capsys):
    """The same holds wherever a recipe or an option names shards or sources."""
    from data_tools import check_shards, encode_codes, inspect_shards, make_shards
    from mmtensorar.data import loader
    from tests.helpers.loading import make_recipe

    monkeypatch.chdir(tmp_path)
    mark = tmp_path / "mark"
    place = place.format(mark=mark)
    with pytest.raises(ValueError):
        next(loader.stream(make_recipe(place), None, rank=0, world_size=1))
    commands = [(check_shards.main, [place]), (inspect_shards.main, [place])]
    commands += [(encode_codes.main, [place, "--image-tokenizer", str(fuzz.__file__)])]
    commands += [
        (make_shards.main, [f"--{kind}", place, "--out", "set"])
        for kind in ("folder", "jsonl", "csv", "tars", "parquet")
    ]
    for main, arguments in commands:
        assert main(arguments) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert not mark.exists()
