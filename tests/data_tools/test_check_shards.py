"""Checking, repairing and inspecting shard sets; ordinary WebDataset readers can read
them.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_tools import check_shards, inspect_shards, make_shards
from mmtensorar.data.pictures import decode_picture
from mmtensorar.data.shards import Manifest, Sample, iterate_tar, sample_starts, write_tar


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def keys(folder: Path) -> list[str]:
    return [s.key for shard in Manifest.read(folder).shards for s in iterate_tar(folder / shard.name)]


def check(folder: Path, *arguments: object, workers: int = 1) -> int:
    return check_shards.main([str(folder), "--workers", str(workers), *map(str, arguments)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Twelve shapes in four shards."""
    folder = tmp_path_factory.mktemp("whole") / "set"
    arguments = [
        "--synthesize",
        "shapes",
        "--num-samples",
        "12",
        "--samples-per-shard",
        "3",
        "--image-size",
        "16",
    ]
    assert make_shards.main([*arguments, "--workers", "1", "--out", str(folder)]) == 0
    return folder


def rewrite(folder: Path, name: str, change) -> None:
    """Change the samples of a shard, and update its hash and count."""
    written = write_tar(folder / name, change(list(iterate_tar(folder / name))))
    manifest = Manifest.read(folder)
    changed = tuple(written if shard.name == name else shard for shard in manifest.shards)
    total = sum(shard.num_samples for shard in changed)
    manifest.model_copy(update={"shards": changed, "num_samples": total}).write(folder)


@pytest.fixture
def damaged(tmp_path, whole) -> Path:
    """One damage of every kind: a bad caption, a key that another shard has, a
    duplicate picture, a truncated tar.
    """
    folder = tmp_path / "set"
    shutil.copytree(whole, folder)
    first = next(iter(iterate_tar(folder / "00000.tar")))
    rewrite(
        folder,
        "00000.tar",
        lambda found: [found[0], Sample(found[1].key, found[1].members | {"txt": b"\xff"}), found[2]],
    )
    rewrite(folder, "00001.tar", lambda found: [found[0], found[1]._replace(key=first.key), found[2]])
    rewrite(folder, "00002.tar", lambda found: [found[0], found[1], Sample("extra", first.members), found[2]])
    path = folder / "00003.tar"
    path.write_bytes(path.read_bytes()[: int(sample_starts(path)[1]) + 700])
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_a_report_lists_every_problem_with_shard_and_key(tmp_path, damaged, capsys, workers):
    assert check(damaged, "--report", tmp_path / "report.json", workers=workers) == 2
    found = json.loads((tmp_path / "report.json").read_text())
    assert {k: found[k] for k in ("ok", "shards", "samples", "read", "good")} == {
        "ok": False,
        "shards": 4,
        "samples": 13,
        "read": 11,
        "good": 9,
    }
    told = [(each["shard"], each["key"]) for each in found["problems"]]
    assert (
        ("00000.tar", "000000001") in told
        and ("00001.tar", "000000000") in told
        and ("00003.tar", None) in told
    )
    assert [each["problem"] for each in found["problems"]] == [
        line.removeprefix("error: ") for line in capsys.readouterr().err.splitlines()
    ]
    assert any("2 of its samples cannot be reached" in each["problem"] for each in found["problems"])
    assert found["duplicates"] == [{"shard": "00002.tar", "key": "extra", "same_as": "000000000"}]


def test_a_good_set_is_repaired_to_the_same_bytes(tmp_path, whole):
    assert check(whole, "--report", tmp_path / "report.json") == 0
    assert json.loads((tmp_path / "report.json").read_text())["ok"]
    assert check(whole, "--repair", tmp_path / "clean") == 0
    assert (
        content(tmp_path / "clean") == content(whole)
        and (tmp_path / "clean" / "dropped.jsonl").read_text() == ""
    )


@pytest.mark.parametrize(("duplicates", "workers"), [(False, 1), (True, 2)])
def test_repairing_keeps_good_samples_and_names_dropped_ones(tmp_path, damaged, duplicates, workers):
    before = content(damaged)
    out = tmp_path / "clean"
    assert (
        check(damaged, "--repair", out, *(["--drop-duplicates"] if duplicates else []), workers=workers) == 0
    )
    assert content(damaged) == before and check(out) == 0
    good = [
        "000000000",
        "000000002",
        "000000003",
        "000000005",
        "000000006",
        "000000007",
        "000000008",
        "000000009",
    ]
    expected = good if duplicates else [*good[:6], "extra", *good[6:]]
    assert keys(out) == expected
    lines = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} >= {"000000001", "000000000", *(["extra"] if duplicates else [])}
    for shard in Manifest.read(out).shards:
        originals = (
            {sample.key: sample for sample in iterate_tar(damaged / shard.name)}
            if shard.name != "00003.tar"
            else {}
        )
        assert all(originals[s.key] == s for s in iterate_tar(out / shard.name) if s.key in originals)


def test_an_interrupted_repair_resumes(tmp_path, damaged, monkeypatch):
    assert check(damaged, "--repair", tmp_path / "one") == 0
    real, calls = check_shards.write_good, []

    def interrupted(*task):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(task)
        return real(*task)

    monkeypatch.setattr(check_shards, "write_good", interrupted)
    assert (
        check(damaged, "--repair", tmp_path / "two") == 130
        and not (tmp_path / "two" / "manifest.json").exists()
    )
    calls.clear()
    monkeypatch.setattr(check_shards, "write_good", lambda *task: calls.append(task) or real(*task))
    assert check(damaged, "--repair", tmp_path / "two") == 0
    assert len(calls) == 2 and content(tmp_path / "two") == content(tmp_path / "one")


def test_a_set_that_cannot_be_repaired_is_one_sentence(tmp_path, damaged, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert check(damaged, "--repair", tmp_path / "full") == 2
    assert f"{tmp_path / 'full'} is not empty: it has mine.txt" in capsys.readouterr().err
    for path in damaged.glob("*.tar"):
        path.write_bytes(b"")
    assert check(damaged, "--repair", tmp_path / "clean") == 2
    assert "no good sample is left to write" in capsys.readouterr().err and not (tmp_path / "clean").exists()
    (damaged / "manifest.json").write_text("{")
    assert check(damaged) == 2 and "not JSON" in capsys.readouterr().err


def test_a_missing_shard_is_a_problem_and_the_others_are_read(tmp_path, damaged, capsys):
    (damaged / "00001.tar").unlink()
    assert check(damaged, "--repair", tmp_path / "clean") == 0
    assert "00001.tar: No such file or directory" in capsys.readouterr().err
    assert [shard.name for shard in Manifest.read(tmp_path / "clean").shards] == [
        "00000.tar",
        "00002.tar",
        "00003.tar",
    ]


# ---- looking at a set ------------------------------------------------------------------------


def test_the_page_shows_pictures_with_escaped_captions_and_loads_nothing(tmp_path, whole, capsys):
    folder = tmp_path / "set"
    shutil.copytree(whole, folder)
    script = b"<script>alert(1)</script>"
    rewrite(folder, "00000.tar", lambda found: [Sample(s.key, s.members | {"txt": script}) for s in found])
    assert inspect_shards.main([str(folder), "--html", str(tmp_path / "sheet.html"), "--num", "8"]) == 0
    out, page = capsys.readouterr().out, (tmp_path / "sheet.html").read_text()
    assert "12 in 4 shards" in out and "10 different, 2 repeated" in out and "words of a caption" in out
    assert "<script" not in page and "&lt;script&gt;" in page and "http" not in page
    assert page.count("<figure>") == 8 and page.count("data:image/jpeg;base64,") == 8


def test_histograms_count_every_value_once():
    rng = np.random.default_rng(0)
    for _ in range(100):
        values = rng.integers(0, rng.integers(1, 300), rng.integers(1, 50)).tolist()
        rows = inspect_shards.histogram(values)
        assert sum(number for _, number in rows) == len(values) and len(rows) <= inspect_shards.BINS
        for label, number in rows:
            low, high = (int(part) for part in (label.split("-") * 2)[:2])
            assert number == sum(low <= value <= high for value in values)


def test_inspecting_a_damaged_set_names_the_damage(damaged, capsys):
    assert inspect_shards.main([str(damaged)]) == 2
    assert "00000.tar: sample 000000001: the caption is not UTF-8" in capsys.readouterr().err


# ---- other readers ---------------------------------------------------------------------------


def test_webdataset_reads_the_shards(whole):
    import webdataset as wds

    urls = sorted(map(str, whole.glob("*.tar")))
    found = list(
        wds.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "txt", "json")
    )
    ours = [sample for shard in Manifest.read(whole).shards for sample in iterate_tar(whole / shard.name)]
    assert [key for key, *_ in found] == [sample.key for sample in ours]
    for (_, image, caption, meta), sample in zip(found, ours, strict=True):
        assert caption.encode() == sample.members["txt"] and meta == json.loads(sample.members["json"])
        assert np.array_equal(np.asarray(image), np.asarray(decode_picture(sample.members["jpg"], "")))


@pytest.mark.slow
def test_datasets_reads_the_shards(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    files = sorted(map(str, whole.glob("*.tar")))
    found = datasets.load_dataset(
        "webdataset", data_files={"train": files}, split="train", cache_dir=str(tmp_path)
    )
    ours = [sample for shard in Manifest.read(whole).shards for sample in iterate_tar(whole / shard.name)]
    assert len(found) == len(ours)
    for row, sample in zip(found, ours, strict=True):
        assert row["__key__"] == sample.key and row["txt"].encode() == sample.members["txt"]
        assert np.array_equal(np.asarray(row["jpg"]), np.asarray(decode_picture(sample.members["jpg"], "")))
