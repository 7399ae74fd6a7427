"""`mmtensorar VERB`: every verb explains itself, and a wrong command ends in one sentence."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from mmtensorar import cli

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_help_of_every_verb_has_an_example(verb, capsys):
    if verb == "train":
        pytest.importorskip("deepspeed")
    with pytest.raises(SystemExit) as ended:
        cli.main([*verb.split(), "--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and "usage:" in printed
    assert re.search(r"^ +(python|mmtensorar|deepspeed|torchrun) \S", printed, re.M)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_without_a_verb_all_verbs_are_listed(words, capsys):
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert all(f"  {verb} " in printed and about in printed for verb, (_, about, _) in cli.VERBS.items())


def test_the_version_is_that_of_the_project(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.split() in (["mmtensorar", cli.version()],)
    assert (
        f'version = "{cli.version()}"' in (ROOT / "pyproject.toml").read_text() or cli.version() == "unknown"
    )


@pytest.mark.parametrize(
    "words, hint",
    [
        (["genrate"], "did you mean generate?"),
        (["shard", "make"], "did you mean shards make?"),
        (["shards", "mak"], "did you mean shards make?"),
        (["shards"], "expected one of shards make, shards encode-codes"),
        (["geneval"], "did you mean eval geneval?"),
        (["xyzzy"], "expected one of convert, eval, export"),
    ],
)
def test_an_unknown_verb_suggests_the_nearest(words, hint, capsys):
    assert cli.main(words) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and hint in printed.err and not printed.out


@pytest.mark.parametrize(
    "error, code, printed",
    [
        (ValueError("train.steps is 0"), 2, "error: train.steps is 0\n"),
        (OSError("disk full"), 2, "error: disk full\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
)
def test_errors_of_a_command_are_one_sentence(error, code, printed, capsys):
    @cli.command
    def main(arguments: list[str] | None = None) -> int:
        raise error

    assert main([]) == code and capsys.readouterr().err == printed


def test_a_bug_keeps_its_traceback():
    @cli.command
    def main(arguments: list[str] | None = None) -> int:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        main([])


def test_a_verb_of_the_checkout_is_refused_in_an_installed_copy(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "mmtensorar" / "cli.py"))
    with pytest.raises(ValueError, match="shards make runs from a checkout"):
        cli.load("shards make")


def test_python_m_mmtensorar_is_the_same_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mmtensorar", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("mmtensorar", run_name="__main__")
    assert ended.value.code == 0 and capsys.readouterr().out == f"mmtensorar {cli.version()}\n"
