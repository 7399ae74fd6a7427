"""Damage good files in many ways and check that every reader reports it:
`python -m tests.fuzz`.

There are two subjects: shard sets (damage.py, readers.py), and what they are made from:
tables, prompts files and tars of pictures (sources.py). A case changes one file (bits,
lengths, tar headers, names, arrays, pictures, captions, lines, the manifest) and lets
every reader of it read it. A reader must return every sample, or name the damaged file
in one sentence (a ValueError), or, if it skips, count what is missing. Anything else is
a failure: another exception, a process that dies, hangs or takes a lot of memory, and
samples that are lost silently. Case i of a seed is always the same.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from mmtensorar.data.shards import Manifest
from tests.fuzz import sources
from tests.fuzz.damage import NUM_SHARDS, PER_SHARD, Damage, Rng, damage, write_good
from tests.fuzz.readers import READERS, Reader

TIME_LIMIT_S, MEMORY_LIMIT = 10.0, 2**31
BAD = ("crash", "hang", "memory", "silent loss")


class Verdict(NamedTuple):
    """kind: refused, unharmed, changed, skipped, or one of BAD.

    detail: the sentence, or what went wrong.
    """

    kind: str
    detail: str = ""


class Subject(NamedTuple):
    """What is damaged.

    Args:
        write_good: Writes good files into a new folder.
        damage: Changes one of them.
        readers: Name -> reader.
        expected: Folder, reader's name, damage -> the number of samples that the reader
            must account for; None when it does not read the damaged file.
    """

    write_good: Callable[[Path], None]
    damage: Callable[[Path, Rng], Damage]
    readers: dict[str, Reader]
    expected: Callable[[Path, str, Damage], int | None]


def _expected_of_shards(folder: Path, reader: str, done: Damage) -> int:
    if "--tars" in reader:  # without the manifest, tars do not show how many samples there were
        return min(done.left, NUM_SHARDS * PER_SHARD)
    try:
        return min(Manifest.read(folder).num_samples, NUM_SHARDS * PER_SHARD)
    except (ValueError, OSError):
        return 0


def _expected_of_sources(folder: Path, reader: str, done: Damage) -> int | None:
    return done.left if reader.partition(",")[0] == done.what.partition(" ")[0] else None


SHARDS = Subject(write_good, damage, READERS, _expected_of_shards)
SOURCES = Subject(sources.write_good, sources.damage, sources.readers(), _expected_of_sources)
SUBJECTS = {"shards": SHARDS, "sources": SOURCES}


def judge(
    read: Reader, folder: Path, expected: int, is_changed: bool, *, must_report: bool = False
) -> Verdict:
    """The verdict on a reader with a damaged folder.

    Args:
        read: The reader.
        folder: The damaged folder.
        expected: Number of samples that it must account for.
        is_changed: Whether the damage changed a file.
        must_report: Whether reading all samples is a failure.
    """
    try:
        names, num_missing = read(folder)
    except ValueError as error:
        sentence = str(error)
        if str(folder) not in sentence or "\n" in sentence:
            return Verdict("crash", f"a sentence that does not name the file: {sentence[:300]}")
        return Verdict("refused", sentence)
    except MemoryError:
        return Verdict("memory")
    except Exception:  # this is what the fuzzer looks for
        return Verdict("crash", traceback.format_exc())
    if len(names) + num_missing < expected:
        detail = f"{len(names)} samples read and {num_missing} reported missing, of {expected}"
        return Verdict("silent loss", detail)
    if num_missing:
        return Verdict("skipped")
    if must_report and is_changed:
        return Verdict("silent loss", "an incomplete picture was read without a word")
    return Verdict("changed" if is_changed else "unharmed")


# ---- cases, in a child process ---------------------------------------------------------------


def run_case(good: Path, work: Path, seed: int, case: int, subject: Subject) -> list[tuple]:
    """(reader, damage, verdict) for every reader on one case."""
    rng = np.random.default_rng([seed, case])
    folder = work / "set"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    done = subject.damage(folder, rng)
    changed = any((folder / path.name).read_bytes() != path.read_bytes() for path in good.iterdir())
    verdicts = []
    for name, read in subject.readers.items():
        expected = subject.expected(folder, name, done)
        if expected is not None:
            verdict = judge(read, folder, expected, changed, must_report=done.must_report)
            verdicts.append((name, done.what, verdict))
            shutil.rmtree(folder / sources.OUT, ignore_errors=True)
    return verdicts


def serve(pipe, good: Path, work: Path, seed: int, subject: Subject) -> None:
    """In a child process: run the cases that come through the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hides the notes that sources print
    work.mkdir(parents=True, exist_ok=True)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_LIMIT,) * 2)
    pipe.send(None)
    while (case := pipe.recv()) is not None:
        try:
            pipe.send(run_case(good, work, seed, case, subject))
        except Exception:  # a bug of the fuzzer, which must be reported too
            pipe.send(Verdict("crash", f"of the fuzzer itself: {traceback.format_exc()}"))


class Child:
    """A process that runs cases, so that a crash or a hang ends only that process."""

    def __init__(self, good: Path, work: Path, seed: int, subject: Subject):
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("fork").Process(
            target=serve, args=(theirs, good, work, seed, subject), daemon=True
        )
        self.process.start()
        theirs.close()
        self.pipe.recv()

    def run(self, case: int, limit_s: float) -> list[tuple] | Verdict:
        self.pipe.send(case)
        try:
            if self.pipe.poll(limit_s):
                return self.pipe.recv()
        except EOFError:
            self.process.join(5)
            return Verdict("crash", f"the process died with exit code {self.process.exitcode}")
        return Verdict("hang", f"no answer in {limit_s:g} s")

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def fuzz(
    seed: int,
    *,
    seconds: float = float("inf"),
    cases: range | None = None,
    subject: Subject = SHARDS,
    limit_s: float = TIME_LIMIT_S,
    keep: Path | None = None,
) -> tuple[Counter[tuple[str, str]], list[str], int]:
    """Run cases until the time is over.

    Args:
        seed: Of the cases.
        seconds: Stop after this time.
        cases: Their numbers; None is 0, 1, 2, ...
        subject: What is damaged, and who reads it.
        limit_s: A reader that takes longer hangs.
        keep: Folder for the sets at which a reader failed.

    Returns the counts of (reader, verdict), the failures in words, and the number of
    cases.
    """
    counts: Counter[tuple[str, str]] = Counter()
    failures: list[str] = []
    tried, deadline = 0, time.monotonic() + seconds
    with (
        tempfile.TemporaryDirectory() as temporary,
        tqdm(desc="fuzzing", unit=" cases", disable=None) as progress,
    ):
        good, work = Path(temporary) / "good", Path(temporary) / "work"
        subject.write_good(good)
        child = Child(good, work, seed, subject)
        for case in cases if cases is not None else iter(range(10**12)):
            if time.monotonic() > deadline:
                break
            verdicts = child.run(case, limit_s)
            if isinstance(verdicts, Verdict):  # the child cannot be used again
                child.stop()
                child = Child(good, work, seed, subject)
                verdicts = [("a reader", "?", verdicts)]
            for name, done, verdict in verdicts:
                counts[name, verdict.kind] += 1
                if verdict.kind in BAD:
                    failures.append(
                        f"case {case} of seed {seed}, {done}, {name}: {verdict.kind}: {verdict.detail}"
                    )
                    if keep is not None and (work / "set").is_dir():
                        shutil.copytree(work / "set", keep / f"{seed}-{case}", dirs_exist_ok=True)
            tried += 1
            progress.update(1)
        child.stop()
    return counts, failures, tried


def table(counts: Counter[tuple[str, str]]) -> str:
    kinds = ("unharmed", "changed", "refused", "skipped", *BAD)
    lines = [f"| reader | {' | '.join(kinds)} |", f"|---|{'---:|' * len(kinds)}"]
    for name in dict.fromkeys(name for name, _ in counts):
        lines.append(f"| {name} | {' | '.join(str(counts[name, kind]) for kind in kinds)} |")
    return "\n".join(lines)
