"""The fuzzer finds failures in readers that are wrong, and finds none in ours."""

import os
import signal
import time

import pytest

from mmtensorar.data.shards import Manifest, iterate_shard
from tests.fuzz import __main__ as command
from tests.fuzz import fuzz


@pytest.mark.slow
def test_our_readers_give_every_sample_or_a_sentence():
    counts, failures, tried = fuzz.fuzz(7, cases=range(200))
    assert not failures
    assert tried == 200 and sum(counts.values()) == tried * len(fuzz.READERS)
    for name in fuzz.READERS:  # not all damage has the same effect
        assert counts[name, "refused"] > 10
    assert counts["training, skip", "skipped"] > 20


@pytest.mark.slow
def test_no_row_or_picture_of_a_source_is_lost():
    counts, failures, tried = fuzz.fuzz(7, cases=range(200), subject=fuzz.SOURCES)
    assert not failures
    assert tried == 200 and sum(counts.values()) > tried
    for name in fuzz.SOURCES.readers:
        assert counts[name, "refused"] + counts[name, "skipped"] > 5


def of_good_shards(folder):
    """A reader that reads correctly, but ends a damaged shard silently."""
    manifest = Manifest.read(folder)
    found = []
    for shard in manifest.shards:
        try:
            found += [sample.key for sample in iterate_shard(folder, shard)]
        except ValueError:
            pass
    return found, 0


def with_a_bare_error(folder):
    raise KeyError("members")


def without_a_name(folder):
    raise ValueError("damaged")


def dying(folder):
    os.kill(os.getpid(), signal.SIGKILL)


def endless(folder):
    time.sleep(60)


def greedy(folder):
    return [str(len(bytearray(2**33)))], 0


@pytest.mark.launch
@pytest.mark.parametrize(
    ("reader", "kind"),
    [
        (of_good_shards, "silent loss"),
        (with_a_bare_error, "crash: Traceback"),
        (without_a_name, "crash: a sentence that does not name the file"),
        (dying, "crash: the process died with exit code -9"),
        (endless, "hang"),
        (greedy, "memory"),
    ],
)
def test_wrong_readers_are_reported(reader, kind, tmp_path):
    subject = fuzz.SHARDS._replace(readers={"wrong": reader})
    _, failures, tried = fuzz.fuzz(0, cases=range(8), subject=subject, limit_s=0.5, keep=tmp_path)
    assert tried == 8 and any(kind in failure for failure in failures)
    assert any(tmp_path.iterdir())  # the set on which the reader failed, for inspection


def test_a_case_is_always_the_same(tmp_path):
    found = []
    for name in ("one", "two"):
        fuzz.write_good(tmp_path / name / "good")
        work = tmp_path / name / "work"
        work.mkdir()
        fuzz.run_case(tmp_path / name / "good", work, 3, 5, fuzz.SHARDS._replace(readers={}))
        found.append({path.name: path.read_bytes() for path in (work / "set").iterdir()})
    assert found[0] == found[1]


def test_the_command_reports_and_exits(capsys, monkeypatch):
    assert command.main(["--case", "3"]) == 0
    assert "1 cases" in capsys.readouterr().out
    wrong = fuzz.SHARDS._replace(readers={"wrong": with_a_bare_error})
    monkeypatch.setitem(command.SUBJECTS, "shards", wrong)
    assert command.main(["--case", "3"]) == 1
    assert "1 failures" in capsys.readouterr().out
