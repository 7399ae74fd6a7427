"""Every command ends bad text with a sentence and exit code 2; the fuzzer finds
commands that do not.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from mmtensorar import cli
from tests.fuzz import command_lines

ROOT = Path(__file__).resolve().parents[2]


def test_every_verb_is_tried():
    assert {verb for verb in cli.VERBS if any(call.startswith(verb) for call in command_lines.CALLS)} == set(
        cli.VERBS
    )


@pytest.mark.slow
def test_random_text_in_every_option_ends_with_a_sentence():
    failures = command_lines.fuzz(7, range(8 * len(command_lines.CALLS)))
    assert not failures, failures[0]


@pytest.mark.parametrize(
    "error, what",
    [
        (KeyError("MPO"), "KeyError"),
        (UnicodeError("x"), None),
        (ValueError("embedded null byte"), "Python's own words"),
        (RuntimeError("x"), "RuntimeError"),
        (RuntimeError("Symlink loop from 'a'"), None),
        (OSError(36, "File name too long", "a" * 5000), None),
        (UnicodeEncodeError("utf-8", "a\ud800", 1, 2, "surrogates not allowed"), None),
        (UnicodeDecodeError("utf-8", b"a\xff", 1, 2, "invalid start byte"), None),
        (PermissionError(13, "Permission denied", "a\udcff"), None),
        (IsADirectoryError(21, "Is a directory", b"a\xff"), None),
    ],
)
def test_a_wrong_command_is_found(monkeypatch, error, what):
    @cli.command
    def main(arguments: list[str] | None = None) -> int:
        raise error

    monkeypatch.setattr(cli, "load", lambda name: main)
    found = command_lines.judge(["merge"])
    assert found is None if what is None else what in found


@pytest.mark.parametrize(
    "error, sentence",
    [
        (FileNotFoundError(2, "No such file or directory", "a.png"), "a.png: no such file or directory"),
        (PermissionError(13, "Permission denied", "a\udcff\x1b[31m"), r"a\udcff\x1b[31m: permission denied"),
        (
            OSError(36, "File name too long", "a" * 5000),
            "a" * 200 + "... (5000 characters): file name too long",
        ),
        (OSError(28, "No space left on device"), "no space left on device"),
        (UnicodeEncodeError("utf-8", "abc\ud800", 3, 4, "no"), "holds half a character"),
        (UnicodeDecodeError("utf-8", b"abc\xff", 3, 4, "no"), r"expected UTF-8, got b'abc\xff'"),
        (ValueError(), "ValueError"),
    ],
)
def test_errors_of_python_are_sentences(error, sentence, capsys):
    cli.print_error(error)
    assert sentence in capsys.readouterr().err


@pytest.mark.launch
@pytest.mark.parametrize(
    "words",
    [
        [b"generate", b"--ckpt", b"x", b"--prompt", b"caf\xe9"],
        [b"recipe", b"\xff\xfe.yaml"],
        [b"shards", b"make", b"--folder", b"b\xe4", b"--out", b"o"],
        [b"train", b"r.yaml", b"run.name=\x80"],
    ],
)
def test_bytes_that_are_not_text_are_refused(words):
    """A terminal or a script in Latin-1 passes such bytes; the answer was a
    UnicodeEncodeError.
    """
    done = subprocess.run([sys.executable, "-m", "mmtensorar", *words], cwd=ROOT, capture_output=True)
    assert done.returncode == 2 and b"not UTF-8" in done.stderr and b"Traceback" not in done.stderr
