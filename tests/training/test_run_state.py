"""Writing checkpoints: which ones are kept, and which remain usable after a failure."""

import json
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from mmtensorar import processes
from mmtensorar.checkpoints import sharded_state
from mmtensorar.checkpoints.export import find

saving = pytest.importorskip("mmtensorar.training.run_state")
CPU = torch.device("cpu")


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A factory for a Saver with one rank and one weight."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(saving, "on_all_ranks", lambda work, device: work())
    weight = torch.nn.Parameter(torch.arange(4.0))
    optimizer = torch.optim.AdamW([weight])
    module = SimpleNamespace(named_parameters=lambda: [("weight", weight)], parameters=lambda: [weight])
    engine = SimpleNamespace(
        module=module, optimizer=optimizer, zero_optimization_stage=lambda: 0, bfloat16_enabled=lambda: False
    )

    def build(**options):
        settings = {"keep_last": 2, "keep_best": True, "background": False} | options
        return saving.Saver(engine, tmp_path / "checkpoints", {"shards": "x"}, **settings)

    return build


def steps(saver) -> list[int]:
    return sorted(sharded_state.step_of(path) for path in saver.folder.glob("step_*"))


@pytest.mark.parametrize("background", [False, True])
def test_the_newest_and_the_best_run_states_are_kept(make, background):
    saver = make(background=background)
    for step, loss in ((9, 3.0), (10, 1.0), (11, None), (999_999, 2.0), (1_000_000, 4.0)):
        saver.save(step, {"validation_loss": loss}, None, CPU)
    saver.finish(CPU)
    assert steps(saver) == [10, 999_999, 1_000_000]
    assert (saver.folder / "best").read_text() == "step_000010" and sharded_state.latest(saver.folder)[
        "step"
    ] == 1_000_000


def test_after_setting_a_run_back_later_run_states_do_not_count(make):
    """The message about a damaged checkpoint advises to set the run back.

    The abandoned checkpoint then counts neither as the newest nor as the best.
    """
    saver = make()
    for step, loss in ((1, 3.0), (2, 1.0)):
        saver.save(step, {"validation_loss": loss}, None, CPU)
    (saver.folder / "latest").write_text("step_000001")
    (saver.folder / "step_000002" / sharded_state.STATE).write_text("{")
    saver.save(2, {"validation_loss": 2.0}, None, CPU)
    saver.save(3, {"validation_loss": 2.5}, None, CPU)
    assert steps(saver) == [2, 3] and (saver.folder / "best").read_text() == "step_000002"
    (saver.folder / "step_000007").mkdir()
    (saver.folder / "step_000007" / sharded_state.STATE).write_text(
        json.dumps(sharded_state.latest(saver.folder) | {"step": 7})
    )
    saver.save(4, {}, None, CPU)
    assert steps(saver) == [2, 3, 4]


def test_a_failed_write_is_reported_and_the_next_run_state_is_complete(make, monkeypatch, capsys):
    saver, write = make(background=True), sharded_state.write
    saver.save(1, {}, None, CPU)
    saver.finish(CPU)
    monkeypatch.setattr(sharded_state, "write", lambda *a: (_ for _ in ()).throw(OSError("no space left")))
    saver.save(2, {}, None, CPU)  # starts to write, and fails in the background
    monkeypatch.setattr(sharded_state, "write", write)
    saver.thread.join()
    assert saver.failure is not None, "which the training looks at every step"
    saver.look_back(CPU)
    assert "could not be written (no space left)" in capsys.readouterr().out
    saver.save(3, {}, None, CPU)
    assert saver.thread is None, "this one was waited for"
    assert "run state of step 3 is complete" in capsys.readouterr().out
    assert sharded_state.latest(saver.folder)["step"] == 3
    monkeypatch.setattr(sharded_state, "write", lambda *a: (_ for _ in ()).throw(OSError("no space left")))
    saver.save(4, {}, None, CPU)
    with pytest.raises(ValueError, match="could not be written .no space left"):
        saver.finish(CPU)
    assert sharded_state.latest(saver.folder)["step"] == 3
    monkeypatch.setattr(sharded_state, "write", write)
    saver.save(4, {}, None, CPU)  # the remains of the failed attempt do no harm
    saver.finish(CPU)
    assert sharded_state.latest(saver.folder)["step"] == 4


def test_only_one_process_locks_a_run_folder(tmp_path):
    folder = tmp_path / "run"
    with processes.RunFolderLock(folder):
        with pytest.raises(
            ValueError, match=r"run: another process .+\(process \d+ on .+\); stop it, or leave"
        ):
            with processes.RunFolderLock(folder, otherwise="leave"):
                pass
    with processes.RunFolderLock(folder):
        pass


@pytest.mark.parametrize("name", ["run", "runs/deep/run"])
def test_a_refused_run_leaves_no_folder(tmp_path, name):
    """`train` with a wrong shard folder used to leave runs/NAME/lock, which the next
    run stumbled over.
    """
    with pytest.raises(ValueError, match="refused"), processes.RunFolderLock(tmp_path / name):
        raise ValueError("refused")
    assert not any(tmp_path.iterdir())
    with processes.RunFolderLock(tmp_path / name):
        assert (tmp_path / name / "lock").is_file()
    assert (tmp_path / name).is_dir()


def test_a_failed_run_keeps_what_was_there_or_was_written(tmp_path):
    (tmp_path / "before").mkdir()
    for name in ("before", "written"):
        with pytest.raises(ValueError), processes.RunFolderLock(tmp_path / name):
            if name == "written":
                (tmp_path / name / "log.jsonl").write_text("")
            raise ValueError
    assert (tmp_path / "before").is_dir() and (tmp_path / "written" / "log.jsonl").is_file()


def test_a_child_does_not_keep_the_lock(tmp_path):
    """Loader workers are forked.

    A worker that outlived its rank would keep the run folder locked.
    """
    folder = tmp_path / "run"
    with processes.RunFolderLock(folder) as lock:
        processes.release_in_child()
        assert lock._file.closed


def test_signals_are_recorded_and_a_second_ctrl_c_stops_at_once(monkeypatch):
    said = []
    signals = processes.StopSignals(said.append)
    assert not signals.requested and signals.exit_code == 128 + signal.SIGTERM
    signals._handle(signal.SIGINT, None)
    signals._handle(signal.SIGINT, None)  # sent on by the launcher
    assert signals.requested and signals.exit_code == 128 + signal.SIGINT and len(said) == 1
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 2)
    signals._handle(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        signals._handle(signal.SIGINT, None)


def test_an_incomplete_run_state_is_reported_with_a_remedy(make):
    saver = make(background=False)
    saver.save(1, {}, None, CPU)
    saver.save(2, {}, None, CPU)
    path = saver.folder / "step_000002" / sharded_state.STATE
    path.write_text("{")
    with pytest.raises(ValueError, match="damaged.*write step_000001 into .+latest"):
        sharded_state.latest(saver.folder)
    path.unlink()
    with pytest.raises(ValueError, match="is missing: write step_000001 into"):
        sharded_state.latest(saver.folder)


def test_rank_0_waits_for_a_limited_time(make, monkeypatch):
    monkeypatch.setattr(saving, "PATIENCE_S", 0.05)
    saver = make()
    saver.num_files = 2
    with pytest.raises(ValueError, match="rank 1 has written nothing for 0.05 seconds"):
        saver.save(1, {}, None, CPU)
    assert not (saver.folder / "latest").exists()


def test_without_the_file_latest_the_newest_run_state_is_used(make):
    """A copy of a run once lost the file `latest`: the run started from scratch and
    deleted its checkpoints.
    """
    saver = make()
    assert saving.latest_step(saver.folder) is None
    for step in (9, 10):
        saver.save(step, {}, None, CPU)
    (saver.folder / "latest").unlink()
    assert saving.latest_step(saver.folder) == 10
    assert (
        find(saver.folder.parent, "latest").name == "step_000010"
        and find(saver.folder.parent, "9").name == "step_000009"
    )
    for step, problem in (
        ("best", "no best step"),
        ("8", "no saved state of step 8; available: latest, 9, 10"),
    ):
        with pytest.raises(ValueError, match=problem):
            find(saver.folder.parent, step)
