"""Shards over HTTP from a server that fails, stalls, truncates and sends wrong bytes.

Also the size limit of the cache, with several processes.
"""

import hashlib
import io
import multiprocessing
import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mmtensorar.data import checks, loader, url_cache
from mmtensorar.data.shards import Manifest, Shard
from mmtensorar.data.url_cache import Cache
from mmtensorar.recipe import Data, Run, Train
from tests.helpers.loading import (
    caption_encoder,
    fake_tokenizer,
    make_recipe,
    write_set,
)

pytestmark = pytest.mark.server


class Server(ThreadingHTTPServer):
    """A server for files, with planned failures.

    files: path -> content. trouble: path -> list of failures, one per request. After
    them requests succeed.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.trouble: dict[str, list] = {}
        self.requests: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/set"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        name = self.path.removeprefix("/set/")
        self.server.requests.append((name, self.headers.get("Range")))
        trouble = self.server.trouble.get(name, [])
        now = trouble.pop(0) if trouble else None
        self.close_connection = True
        if isinstance(now, int):
            self.send_error(now)
        elif name not in self.server.files:
            self.send_error(404)
        else:
            self.send_content(self.server.files[name], now)

    def send_content(self, content: bytes, now: str | None) -> None:
        """Answer with the content from the start that the request asks for.

        now: what goes wrong.
        """
        if now == "lie":
            content = content[::-1]
        wanted = self.headers.get("Range") if now != "no range" else None
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if wanted and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if now == "endless":
            self.end_headers()
            self.send_zeros()
        else:
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.send_body(content[start:], now)

    def send_zeros(self) -> None:
        """Send zeros until the client closes the connection."""
        while self.write(bytes(2**16)):
            pass

    def send_body(self, body: bytes, now: str | None) -> None:
        if now in ("cut", "stall", "slow"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            body = body[len(body) // 2 :]
        if now == "stall":
            time.sleep(2)
        if now == "slow":
            time.sleep(1.5)
        if now not in ("cut", "stall"):
            self.write(body)

    def write(self, body: bytes) -> bool:
        """Send bytes; False when the client has closed the connection."""
        try:
            self.wfile.write(body)
        except OSError:
            return False
        return True

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def put(server: Server, name: str, num_bytes: int = 200_000, seed: int = 0) -> Shard:
    content = np.random.default_rng(seed).bytes(num_bytes)
    server.files[name] = content
    return Shard(name=name, num_samples=1, sha256=hashlib.sha256(content).hexdigest())


def cache(folder: Path, max_bytes: int = 10**7, **settings) -> Cache:
    return Cache(folder, max_bytes, **{"timeout_s": 0.4, "attempts": 3, "wait_s": 0.01} | settings)


def fetch(cache: Cache, server: Server, shard: Shard) -> None:
    with cache.local_path(server.url, shard) as path:
        assert path.read_bytes() == server.files[shard.name]


def stored(folder: Path) -> dict[str, int]:
    return {
        path.name: path.stat().st_size
        for path in folder.iterdir()
        if path.suffix in (".tar", ".part", ".want")
    }


@pytest.mark.parametrize(
    "trouble", [[503, 503], ["cut"], ["stall"], ["cut", 500, "cut", "stall", "cut", 502], [429]]
)
def test_failures_are_retried_and_received_bytes_are_kept(tmp_path, server, trouble):
    shard = put(server, "00000.tar")
    server.trouble["00000.tar"] = list(trouble)
    fetch(cache(tmp_path), server, shard)
    ranges = [wanted for _, wanted in server.requests]
    assert len(ranges) == len(trouble) + 1
    if any(isinstance(each, str) for each in trouble):
        assert ranges[-1] is not None, "it went on where the last transfer ended"
    fetch(cache(tmp_path), server, shard)
    assert len(server.requests) == len(ranges), "it is there"


@pytest.mark.parametrize(
    ("trouble", "expected"),
    [
        ([503] * 3, "00000.tar: 3 attempts failed, the last with: HTTP 503"),
        (["stall", 500, 500, 500], "00000.tar: 3 attempts failed, the last with: HTTP 500"),
        ([404], "00000.tar: HTTP 404"),
        ([403], "00000.tar: HTTP 403"),
        (["lie", "lie"], "00000.tar: its sha256 is .*, the manifest's .*: the set changed, or is damaged"),
        (["endless"], "00000.tar has 1[0-9]{7} bytes or more, data.cache_gb allows 10000000 in all"),
    ],
)
def test_a_failed_download_is_one_sentence_with_the_url(tmp_path, server, trouble, expected):
    shard = put(server, "00000.tar")
    server.trouble["00000.tar"] = list(trouble)
    with pytest.raises(ValueError, match=f"{server.url}/{expected}") as error:
        fetch(cache(tmp_path), server, shard)
    assert "\n" not in str(error.value)
    assert not [name for name in stored(tmp_path) if name.endswith(".tar")]
    server.trouble.clear()
    if trouble != ["endless"]:
        fetch(cache(tmp_path), server, shard)


def test_an_unreachable_server_is_one_sentence(tmp_path, server):
    shard, url = put(server, "00000.tar"), server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match="3 attempts failed, the last with: .*[Rr]efused"):
        with cache(tmp_path).local_path(url, shard):
            pass


def test_a_wrong_transfer_is_tried_again(tmp_path, server):
    shard = put(server, "00000.tar")
    server.trouble["00000.tar"] = ["lie"]
    fetch(cache(tmp_path), server, shard)
    assert len(server.requests) == 2


def test_a_server_without_ranges_begins_again(tmp_path, server):
    shard = put(server, "00000.tar")
    server.trouble["00000.tar"] = ["cut", "no range"]
    fetch(cache(tmp_path), server, shard)
    assert [wanted is None for _, wanted in server.requests] == [True, False]


def test_the_size_limit_is_kept_and_the_least_recently_used_shard_is_removed(tmp_path, server):
    shards = [put(server, f"{number:05d}.tar", 100_000, seed=number) for number in range(5)]
    small = cache(tmp_path, 350_000)
    for number in (0, 1, 2, 0, 3):  # shard 1 was used before 0 and 2
        fetch(small, server, shards[number])
        assert sum(stored(tmp_path).values()) <= 350_000
        time.sleep(0.01)
    before = len(server.requests)
    for number in (0, 2, 3):
        fetch(small, server, shards[number])
    assert len(server.requests) == before
    fetch(small, server, shards[1])
    assert len(server.requests) == before + 1
    with pytest.raises(ValueError, match="has 400000 bytes or more, data.cache_gb allows 350000 in all"):
        fetch(small, server, put(server, "large.tar", 400_000))


def test_a_shard_in_use_is_never_removed(tmp_path, server):
    one, two = put(server, "00000.tar", 100_000), put(server, "00001.tar", 100_000, seed=1)
    small = cache(tmp_path, 150_000)
    with small.local_path(server.url, one) as path:
        with pytest.raises(
            ValueError, match="no room for its 100000 bytes: the 150000 bytes of data.cache_gb are in use"
        ):
            fetch(small, server, two)
        assert path.read_bytes() == server.files["00000.tar"]
    fetch(small, server, two)
    assert list(stored(tmp_path).values()) == [100_000]


def test_files_of_others_are_left_alone(tmp_path, server):
    (tmp_path / "mine.txt").write_text("mine")
    small = cache(tmp_path, 150_000)
    for number in range(3):
        fetch(small, server, put(server, f"{number:05d}.tar", 100_000, seed=number))
    assert (tmp_path / "mine.txt").read_text() == "mine"


def in_process(folder: Path, url: str, shard: Shard, max_bytes: int = 10**7) -> None:
    with cache(folder, max_bytes, timeout_s=5).local_path(url, shard) as path:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard.sha256


def start(*arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=in_process, args=arguments)
    process.start()
    return process


@pytest.mark.launch
def test_of_two_processes_one_downloads_and_both_read(tmp_path, server):
    shard = put(server, "00000.tar")
    server.trouble["00000.tar"] = ["slow"]
    processes = [start(tmp_path, server.url, shard) for _ in range(3)]
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    assert len(server.requests) == 1


@pytest.mark.launch
def test_many_processes_in_a_small_cache_all_read_what_they_want(tmp_path, server):
    shards = [put(server, f"{number:05d}.tar", 50_000, seed=number) for number in range(8)]
    processes = [start(tmp_path, server.url, shards[number % 8], 170_000) for number in range(16)]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert sum(stored(tmp_path).values()) <= 170_000


@pytest.mark.launch
def test_a_killed_download_resumes(tmp_path, server):
    shard = put(server, "00000.tar", 3_000_000)
    server.trouble["00000.tar"] = ["slow"]
    process = start(tmp_path, server.url, shard)
    deadline = time.monotonic() + 10
    while not any(size > 10**6 for name, size in stored(tmp_path).items() if name.endswith(".part")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    fetch(cache(tmp_path), server, shard)
    first, second = (wanted for _, wanted in server.requests)
    assert first is None and int(second.removeprefix("bytes=").rstrip("-")) >= 10**6


# ---- manifests and places --------------------------------------------------------------------


def test_a_manifest_is_downloaded_despite_failures_and_checked(tmp_path, server):
    manifest = Manifest(
        shards=(put(server, "00000.tar"),), num_samples=1, image_size=8, source="test", seed=0
    )
    server.files["manifest.json"] = manifest.model_dump_json().encode()
    server.trouble["manifest.json"] = [500, "cut", "stall"]
    assert cache(tmp_path).manifest(server.url) == manifest == cache(tmp_path).manifest(server.url + "/")
    server.files["manifest.json"] = b"{"
    with pytest.raises(ValueError, match=f"{server.url}/manifest.json: not JSON"):
        cache(tmp_path).manifest(server.url)
    server.trouble["manifest.json"] = ["endless"]
    with pytest.raises(ValueError, match="manifest.json has more than the [0-9]+ bytes allowed"):
        cache(tmp_path).manifest(server.url)


@pytest.mark.parametrize(
    "place",
    [
        "pipe:curl http://a/b",
        "pipe://x",
        "file:///etc",
        "ftp://a/b",
        "shell://ls",
        "memory://a",
        "github://a:b@/c",
    ],
)
def test_commands_and_other_urls_are_refused(place):
    with pytest.raises(
        ValueError, match="is refused; expected a folder, or a URL that begins with http, https, s3, gs, hf"
    ):
        url_cache.is_url(place)


def test_secrets_are_not_shown(tmp_path, server):
    for url in ("http://me:secret@localhost/set", server.url.replace("127.0.0.1", "me:secret@127.0.0.1")):
        with pytest.raises(ValueError, match="a user or password in a URL is refused") as error:
            url_cache.is_url(url)
        assert "secret" not in str(error.value)
    with pytest.raises(ValueError, match="has a query") as error:
        url_cache.is_url("https://a/b?token=secret")
    assert "secret" not in str(error.value)
    assert not url_cache.is_url("data/mine") and url_cache.is_url("s3://bucket/mine")


def test_a_store_that_does_not_answer_is_tried_again_and_then_named(tmp_path, monkeypatch):
    """The library's error is not an OSError.

    The test sets credentials, because without them nothing is tried again.
    """
    store = pytest.importorskip("s3fs").S3FileSystem
    store.clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(url_cache.Unreachable, match="s3://bucket/set/manifest.json: 2 attempts failed"):
        cache(tmp_path, attempts=2).manifest("s3://bucket/set")
    store.clear_instance_cache()  # other tests have another endpoint


def test_a_failed_download_reserves_no_space(tmp_path, server):
    """A file that reserves room used to stay for ever after a failed download, and
    nothing else fitted into the cache.
    """
    one, two = put(server, "00000.tar", 60_000), put(server, "00001.tar", 60_000)
    server.trouble["00000.tar"] = ["lie", 404]
    small = cache(tmp_path, 100_000)
    with pytest.raises(ValueError):
        fetch(small, server, one)
    fetch(small, server, two)
    (tmp_path / "orphan.want").write_text("90000")  # left by a process that was killed
    os.utime(tmp_path / "orphan.want", (1, 1))
    fetch(cache(tmp_path, 100_000), server, one)


def test_an_unavailable_shard_is_requested_once(tmp_path, server, served):
    """Every sample of the shard used to ask again, and so did all samples after it."""
    manifest = Manifest.parse_bytes(server.files["manifest.json"], "x")
    name = manifest.shards[0].name
    server.files[name] = server.files[name][:-1] + b"x"
    recipe = make_recipe(server.url, cache=str(tmp_path / "cache"), on_error="skip", max_skipped=1.0)
    batches = loader.stream(recipe, caption_encoder, rank=0, world_size=1)
    skipped = sum(len(batch.skipped) for batch in islice(batches, 20))
    assert skipped and sum(asked == name for asked, _ in server.requests) <= 2 * len(manifest.shards)


def test_object_stores_go_through_fsspec(tmp_path, monkeypatch):
    """fsspec's in-memory store stands for them: resuming, truncation and a missing file
    work the same way.
    """
    import fsspec

    content = np.random.default_rng(0).bytes(3_000_000)
    system = fsspec.filesystem("memory")
    system.pipe("/bucket/00000.tar", content)
    monkeypatch.setattr(fsspec, "url_to_fs", lambda place: (system, "/" + place.partition("://")[2]))
    shard = Shard(name="00000.tar", num_samples=1, sha256=hashlib.sha256(content).hexdigest())
    partial = (
        tmp_path / f"{hashlib.sha256(f's3://bucket/00000.tar {shard.sha256}'.encode()).hexdigest()[:32]}.part"
    )
    partial.write_bytes(content[:1_000_000])
    with cache(tmp_path).local_path("s3://bucket", shard) as path:
        assert path.read_bytes() == content
    total, start, pieces = url_cache._open_url("s3://bucket/00000.tar", 2_000_000, 1)
    assert (total, start, b"".join(pieces)) == (3_000_000, 2_000_000, content[2_000_000:])
    with pytest.raises(ValueError, match="s3://bucket/1.tar: "):
        with cache(tmp_path).local_path("s3://bucket", shard.model_copy(update={"name": "1.tar"})):
            pass
    with pytest.raises(OSError, match="ended after 5 of 9 bytes"):
        list(url_cache._chunks(io.BytesIO(b"12345"), 9))


# ---- training on a set at a URL ----------------------------------------------------------------


def stream(place: str, folder: Path, **settings) -> list:
    settings = {"batch_size": 8, "shuffle": 16, "cache": str(folder), "cache_gb": 1e-3} | settings
    recipe = SimpleNamespace(run=Run(name="test"), data=Data(shards=place, **settings), train=Train(steps=1))
    return [
        (batch.codes.tolist(), batch.skipped)
        for batch in islice(loader.stream(recipe, caption_encoder, rank=0, world_size=1), 8)
    ]


@pytest.fixture
def served(tmp_path, server) -> Path:
    """A set of 30 samples in 6 shards, in a folder and at server.url."""
    folder = write_set(tmp_path / "set", [5] * 6)
    for path in folder.iterdir():
        server.files[path.name] = path.read_bytes()
    return folder


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_url_gives_the_batches_of_the_folder(tmp_path, server, served, num_workers):
    for number in range(6):
        server.trouble[f"{number:05d}.tar"] = [[503], ["cut"]][number % 2]
    expected = stream(str(served), tmp_path / "unused", num_workers=num_workers)
    assert stream(server.url, tmp_path / "cache", num_workers=num_workers) == expected
    assert not (tmp_path / "unused").exists()


def test_an_unavailable_shard_is_named_by_its_url_or_skipped(tmp_path, server, served):
    del server.files["00003.tar"]
    with pytest.raises(ValueError, match=f"{server.url}/00003.tar: HTTP 404"):
        stream(server.url, tmp_path / "cache")
    batches = stream(server.url, tmp_path / "cache", on_error="skip")
    assert (
        sum(len(skipped) for _, skipped in batches[:3]) + sum(len(skipped) for _, skipped in batches[3:]) >= 5
    )


def test_a_cache_too_small_for_the_lanes_is_refused_at_the_start(tmp_path, server, served):
    recipe = make_recipe(server.url, batch_size=4, cache=str(tmp_path / "cache"), cache_gb=5e-5)
    with pytest.raises(
        ValueError,
        match="data.cache_gb is 5e-05, but this machine reads 4 of http.* at the same time: set it to",
    ):
        checks.preflight(recipe, fake_tokenizer(), caption_encoder, world_size=1)
    recipe = make_recipe(server.url, batch_size=4, cache=str(tmp_path / "cache"), cache_gb=1)
    assert (
        checks.preflight(recipe, fake_tokenizer(), caption_encoder, world_size=1)
        == Manifest.read(served).fingerprint
    )
