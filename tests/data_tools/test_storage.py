"""Shards made from URLs, into URLs, and on Ray have the same content as local shards
made by processes.

The object store is moto's S3 server on this machine.
"""

import gzip
import http.server
import json
import logging
import os
import threading
from functools import partial
from pathlib import Path

import pytest

from data_tools import pipeline, storage
from data_tools.executors import OnRay
from mmtensorar.data.shards import Manifest
from mmtensorar.data.url_cache import Cache
from tests.helpers.sources import (
    COLORS,
    assert_right,
    content,
    fails,
    made,
    make,
    picture,
    write_tar,
)

pytestmark = pytest.mark.server

pytest.importorskip("upath")

CODES = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def server():
    moto = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CODES.items():
            patch.setenv(name, value)
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        yield
    server.stop()


@pytest.fixture
def store(server, request):
    """A bucket that only one test uses."""
    import s3fs

    name = f"bucket-{abs(hash(request.node.nodeid))}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)
    return storage.at(f"s3://{name}/home")


def at(place) -> dict[str, bytes]:
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in storage.files(place)}


def tars_of(found: dict[str, bytes]) -> dict[str, bytes]:
    """All files except the manifest, which names the source."""
    return {name: value for name, value in found.items() if name.endswith(".tar")}


def upload(folder: Path, place) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            (place / path.relative_to(folder).as_posix()).write_bytes(path.read_bytes())


# ---- from a store ----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_a_folder_in_a_store(tmp_path, captioned, store, workers):
    (captioned / "note.md").write_text("left out")
    upload(captioned, store / "files")
    for name, place in {"disk": captioned, "store": store / "files"}.items():
        assert make(tmp_path / name, "--folder", place, "--workers", workers, "--samples-per-shard", 2) == 0
    assert_right(tmp_path / "store")
    assert tars_of(content(tmp_path / "disk")) == tars_of(content(tmp_path / "store"))


def test_a_missing_caption_in_a_store_is_named(tmp_path, captioned, store, capsys):
    (captioned / "red.txt").unlink()
    upload(captioned, store / "files")
    assert f"{store}/files/red.png: no caption" in fails(
        capsys, make(tmp_path / "set", "--folder", store / "files")
    )
    assert make(tmp_path / "set", "--folder", store / "files", "--on-error", "skip") == 0
    assert_right(tmp_path / "set", [color for color in COLORS if color != "red"])


def test_a_table_in_a_store(tmp_path, files, store, capsys):
    rows = [{"image": f"{color}.png", "caption": f"a {color} picture"} for color in COLORS]
    (files / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (files / "list.csv").write_text(
        "image,caption\n" + "\n".join(f"{row['image']},{row['caption']}" for row in rows)
    )
    upload(files, store / "files")
    for kind in ("jsonl", "csv"):
        assert make(tmp_path / kind, f"--{kind}", store / "files" / f"list.{kind}") == 0
        assert_right(tmp_path / kind)


@pytest.mark.parametrize(
    "name", ["../secret.png", "/../secret.png", "s3://other/secret.png", "file:///etc/passwd", "", "."]
)
def test_a_row_reaches_nothing_outside_its_folder(tmp_path, store, capsys, name):
    (store / "secret.png").write_bytes(picture("red"))
    (store / "files" / "list.jsonl").write_text(json.dumps({"image": name, "caption": "x"}))
    assert "lies outside" in fails(capsys, make(tmp_path / "set", "--jsonl", store / "files" / "list.jsonl"))


def test_a_picture_that_is_not_in_the_store_is_named(tmp_path, store, capsys):
    (store / "list.jsonl").write_text(json.dumps({"image": "gone.png", "caption": "x"}))
    assert f"{store}/gone.png: " in fails(capsys, make(tmp_path / "set", "--jsonl", store / "list.jsonl"))


def test_parquet_in_a_store(tmp_path, store):
    import pyarrow.parquet

    table = pyarrow.table(
        {"image": [picture(color) for color in COLORS], "caption": [f"a {color} picture" for color in COLORS]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    (store / "rows.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes())
    assert make(tmp_path / "set", "--parquet", store) == 0
    assert_right(tmp_path / "set")


def test_tars_in_a_store(tmp_path, store):
    members = {}
    for color in COLORS:
        members |= {f"{color}.png": picture(color), f"{color}.txt": f"a {color} picture".encode()}
    tar = write_tar(tmp_path / "a.tar", members)
    (store / "a.tar").write_bytes(tar.read_bytes())
    (store / "packed" / "a.tgz").write_bytes(gzip.compress(tar.read_bytes()))
    (store / "packed" / ".trash" / "a.tar").write_bytes(b"not read")
    assert make(tmp_path / "packed", "--tars", store / "packed") == 0
    assert_right(tmp_path / "packed")
    (store / "packed").fs.rm((store / "packed").path, recursive=True)
    for name, place in {"file": store / "a.tar", "folder": store, "bucket": store.parent}.items():
        assert make(tmp_path / name, "--tars", place) == 0
        assert_right(tmp_path / name)


def test_class_folders_in_a_store(tmp_path, store):
    for color in COLORS:
        (store / color / "1.png").write_bytes(picture(color))
    assert make(tmp_path / "set", "--class-folder", store) == 0
    assert Manifest.read(tmp_path / "set").classes == tuple(sorted(COLORS))
    assert len(made(tmp_path / "set")) == len(COLORS)


def test_a_saved_dataset_in_a_store(tmp_path, store):
    import datasets

    rows = {
        "image": [picture(color) for color in COLORS],
        "caption": [f"a {color} picture" for color in COLORS],
    }
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    upload(tmp_path / "saved", store / "saved")
    assert make(tmp_path / "set", "--dataset", store / "saved") == 0
    assert_right(tmp_path / "set")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def test_a_folder_on_a_web_server(tmp_path, captioned):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=captioned.parent))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert (
            make(
                tmp_path / "set", "--folder", f"http://127.0.0.1:{server.server_address[1]}/{captioned.name}"
            )
            == 0
        )
    finally:
        server.shutdown()
    assert_right(tmp_path / "set")


@pytest.mark.parametrize("source", ["tars", "folder", "parquet", "jsonl", "class-folder"])
@pytest.mark.parametrize("place", ["http://127.0.0.1:9/set", "http://127.0.0.1:{port}/gone", "store"])
def test_what_cannot_be_reached_is_not_an_empty_folder(tmp_path, store, capsys, source, place):
    """`--tars` of a server that did not answer printed `no .tar files in it`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = str(store / "gone") if place == "store" else place.format(port=server.server_address[1])
    try:
        assert make(tmp_path / "set", f"--{source}", place) == 2
    finally:
        server.shutdown()
    assert "or it cannot be reached" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


# ---- into a store ----------------------------------------------------------------------------

SETTINGS = {
    "parts moved": ["--samples-per-shard", "2"],
    "regrouped": [
        "--samples-per-shard",
        "2",
        "--deduplicate",
        "--validation-share",
        "0.4",
        "--on-error",
        "skip",
    ],
    "by bytes": ["--bytes-per-shard", "5K"],
}


def doubled(folder: Path) -> None:
    (folder / "again.png").write_bytes((folder / "red.png").read_bytes())
    (folder / "again.txt").write_text("a red picture")
    (folder / "bad.png").write_bytes(b"no picture")
    (folder / "bad.txt").write_text("a caption")


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_set_in_a_store_has_the_content_of_one_on_a_disk(tmp_path, captioned, store, setting):
    if setting == "regrouped":
        doubled(captioned)
    arguments = ["--folder", captioned, *SETTINGS[setting], "--workers", 2]
    assert make(tmp_path / "set", *arguments) == 0
    assert make(store / "set", *arguments) == 0
    expected = content(tmp_path / "set")
    if setting == "regrouped":
        expected |= {
            f"../set_validation/{name}": value for name, value in content(tmp_path / "set_validation").items()
        }
        assert any(name.startswith("../") for name in expected)
    found = {
        ("" if name.startswith("set/") else "../") + name.removeprefix("set/"): value
        for name, value in at(store).items()
    }
    assert found == expected  # no unfinished files are left


def test_training_reads_what_was_made_in_a_store(tmp_path, captioned, store):
    assert make(store / "set", "--folder", captioned) == 0
    cache = Cache(tmp_path / "cache", 10**9)
    manifest = cache.manifest(f"{store}/set")
    with cache.local_path(f"{store}/set", manifest.shards[0]) as path:
        assert path.stat().st_size > 6000
    assert manifest.num_samples == len(COLORS)


def test_an_interrupted_set_in_a_store_resumes(tmp_path, captioned, store, monkeypatch, capsys):
    arguments = ["--folder", captioned, "--samples-per-shard", 2, "--deduplicate"]
    assert make(tmp_path / "set", *arguments) == 0
    make_part, left = pipeline.make_part, [2]

    def dying(*task):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return make_part(*task)

    monkeypatch.setattr(pipeline, "make_part", dying)
    assert make(store / "set", *arguments) == 130
    monkeypatch.undo()
    capsys.readouterr()
    assert make(store / "set", *arguments) == 0
    assert "2 of 3 parts are finished" in capsys.readouterr().out
    assert at(store / "set") == content(tmp_path / "set")


def test_a_set_in_a_store_is_reused_and_replaced(tmp_path, captioned, store, capsys):
    arguments = ["--folder", captioned, "--samples-per-shard", 2]
    assert make(store / "set", *arguments) == 0
    assert make(store / "set", *arguments) == 0
    assert "reusing" in capsys.readouterr().out
    assert "holds another set" in fails(capsys, make(store / "set", *arguments, "--seed", 1))
    assert make(store / "set", *arguments, "--limit", 3, "--overwrite") == 0
    assert Manifest.read(store / "set").num_samples == 3
    assert sorted(at(store / "set")) == ["00000.tar", "00001.tar", "manifest.json"]


def test_a_folder_that_is_not_a_set_is_not_written_into(store, captioned, capsys):
    (store / "set" / "other.txt").write_text("precious")
    assert "it has no manifest.json, but other.txt" in fails(
        capsys, make(store / "set", "--folder", captioned)
    )


@pytest.mark.parametrize(
    "place", ["pipe:ls", "ftp://host/set", "file:///tmp/set", "http://host/set", "s3://bucket/set?x=1"]
)
def test_invalid_locations_are_refused(place, captioned, capsys):
    with pytest.raises(SystemExit):
        make(place, "--folder", captioned)
    assert "--out: " in capsys.readouterr().err


@pytest.mark.parametrize("place", ["pipe:ls", "ftp://host/files", "github://a:b@/x"])
@pytest.mark.parametrize("kind", ["folder", "jsonl", "csv", "parquet", "tars", "class-folder"])
def test_invalid_sources_are_refused(tmp_path, kind, place, capsys):
    assert "is refused" in fails(capsys, make(tmp_path / "set", f"--{kind}", place))


def test_a_missing_bucket_is_named(server, tmp_path, captioned, capsys):
    assert "absent-bucket" in fails(capsys, make("s3://absent-bucket/set", "--folder", captioned))
    assert "absent-bucket" in fails(capsys, make(tmp_path / "set", "--folder", "s3://absent-bucket/files"))


# ---- on Ray ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray(server):
    ray = pytest.importorskip("ray")
    yield ray
    ray.shutdown()


@pytest.mark.parametrize("setting", SETTINGS)
def test_ray_makes_the_same_set(tmp_path, captioned, ray, setting):
    if setting == "regrouped":
        doubled(captioned)
    arguments = ["--folder", captioned, *SETTINGS[setting]]
    assert make(tmp_path / "local" / "set", *arguments) == 0
    assert make(tmp_path / "ray" / "set", *arguments, "--engine", "ray", "--workers", 2) == 0
    for path in (tmp_path / "local").iterdir():
        assert content(path) == content(tmp_path / "ray" / path.name)


def test_ray_from_store_to_store(tmp_path, captioned, ray, store):
    upload(captioned, store / "files")
    arguments = ["--samples-per-shard", 2, "--workers", 2]
    assert make(tmp_path / "set", "--folder", store / "files", *arguments) == 0
    assert make(store / "set", "--folder", store / "files", *arguments, "--engine", "ray") == 0
    assert at(store / "set") == content(tmp_path / "set")


def test_an_error_on_ray_is_a_sentence(tmp_path, captioned, ray, capfd):
    (captioned / "red.png").write_bytes(b"no picture")
    assert make(tmp_path / "set", "--folder", captioned, "--engine", "ray", "--workers", 2) == 2
    assert f"error: {captioned}/red.png: unreadable image" in capfd.readouterr().err


def dies_once(mark: Path, number: int) -> int:
    if not mark.exists():
        mark.touch()
        os._exit(1)
    return number


def test_a_task_whose_worker_dies_is_tried_again(tmp_path, ray):
    found = OnRay(None, 2)(dies_once, [(tmp_path / f"{number}", number) for number in range(3)], 2)
    assert sorted(found) == [0, 1, 2]


def test_an_unreachable_cluster_is_named(tmp_path, captioned):
    """Runs in its own process, because the Ray of the other tests runs in this one."""
    import subprocess
    import sys

    command = [sys.executable, "data_tools/make_shards.py", "--folder", captioned, "--out", tmp_path / "set"]
    command += ["--engine", "ray", "--ray-address", "127.0.0.1:1"]
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    last = found.stderr.strip().splitlines()[-1]
    assert found.returncode == 2 and last.startswith("error: no Ray cluster at 127.0.0.1:1"), found.stderr
