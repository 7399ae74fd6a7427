"""`mmtensorar VERB`: every verb explains itself, and a wrong command ends in one
sentence.
"""

import re
import runpy
import subprocess
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


@pytest.mark.parametrize("verb", cli.VERBS)
def test_usage_names_the_command_as_it_was_started(verb, capsys):
    """`mmtensorar generate --help` once began with
    `usage: python -m mmtensorar.generate`.
    """
    if verb == "train":
        pytest.importorskip("deepspeed")
        capsys.readouterr()  # its first import may print a warning
    with pytest.raises(SystemExit):
        cli.main([*verb.split(), "--help"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: mmtensorar {verb} ") and "python -m" not in printed.splitlines()[0]
    with pytest.raises(SystemExit):
        cli.load(verb)(["--help"])
    assert capsys.readouterr().out.startswith(
        "usage: mmtensorar plan " if verb == "plan" else "usage: python -m "
    )


def refusal(capsys, *words: str) -> list[str]:
    """The lines that a command with a wrong option prints. It ends with code 2."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    printed = capsys.readouterr()
    assert ended.value.code == 2 and not printed.out
    return printed.err.splitlines()


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_mistyped_option_is_one_sentence(verb, capsys):
    """argparse prints the whole usage, up to 40 lines, before the mistake."""
    if verb == "train":
        pytest.importorskip("deepspeed")
    lines = refusal(capsys, *verb.split(), "--xyzzy", "1")
    assert lines == ["error: unknown option --xyzzy", f"mmtensorar {verb} --help shows the options"]


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("generate --promt x --ckpt y", "unknown option --promt; did you mean --prompt?"),
        ("generate --chkpt y --prompt x", "unknown option --chkpt; did you mean --ckpt?"),
        ("generate --prompt x", "--ckpt is missing"),
        ("convert", "SRC, DST are missing"),
        ("generate --ckpt x --num-images \u00b2", "--num-images: expected a whole number of at least 1, got"),
        ("generate --ckpt x --temperature hot", "--temperature: expected a number, or one per factor"),
        ("generate --ckpt x --cfg-scale 1,x", "--cfg-scale: expected a number, or one per factor, separated"),
        ("generate --ckpt x --seed 1_0", "--seed: expected a whole number, got '1_0'"),
        ("eval geneval --images x --num-images 1_0", "--num-images: expected a whole number"),
        ("image-tokenizer roundtrip a --tokenizer x --image-size 2_5", "--image-size: expected a whole"),
        ("generate --ckpt x --top-k 1_0", "--top-k: expected a whole number, or one per factor"),
        ("generate --ckpt x --top-k 5,1_0", "--top-k: expected a whole number, or one per factor"),
        ("generate --ckpt x --temperature 1_0", "--temperature: expected a number, or one per factor"),
        ("generate --ckpt x --batch-size 1_0", "--batch-size: expected a whole number of at least 1"),
        ("shards make --csv a --out x --max-aspect 1_0", "--max-aspect: expected a number of at least 1"),
        ("generate --ckpt x --seed 99999999999999999999999", "--seed: expected a number less than 2^63"),
        ("generate --ckpt x --num-images 99999999999999999999999", "--num-images: expected a number less"),
        ("generate --ckpt x --class 1 9223372036854775808", "--class: expected a number less than 2^63"),
        ("shards make --csv a --out x --limit 99999999999999999999999", "--limit: expected a number less"),
        ("generate --ckpt x --seed ten", "--seed: expected a whole number, got 'ten'"),
        (
            "generate --ckpt x --prompt",
            "--prompt needs a value; one that starts with - is written --prompt=VALUE",
        ),
        (
            "generate --ckpt x --precision fp23",
            "--precision: expected one of fp32, bf16, got 'fp23'; did you mean fp32?",
        ),
        ("generate --ckpt x a", "unexpected argument 'a'"),
        (
            "recipe r.yaml --train.steps 3",
            "unknown option --train.steps; a setting of the recipe is written train.steps=VALUE",
        ),
        ("recipe", "recipe is missing"),
        ("plan --pan r.yaml", "unknown option --pan"),
        ("shards make --out x", "expected one of --class-folder, "),
        ("shards make --out x --csv a --folder b", "--folder cannot be combined with --csv"),
        ("shards make --out x --csv a --wrokers 2", "unknown option --wrokers; did you mean --workers?"),
        ("shards check x --repair", "--repair needs a value"),
        ("eval geneval --num 3", "--num could be any of --num-images, --num-prompts"),
        ("eval geneval --ckpt x --images y", "--images cannot be combined with --ckpt"),
        ("eval geneval compare x --aut y", "unknown option --aut; did you mean --out?"),
        ("eval geneval watch --no-self-test", "run is missing"),
        (
            "image-tokenizer rundtrip",
            "command: expected one of roundtrip, got 'rundtrip'; did you mean roundtrip?",
        ),
        ("study run --budgte 2h", "unknown option --budgte; did you mean --budget?"),
        ("study run g.yaml --budget 2", "--budget: expected a time such as 90m or 2h, got '2'"),
    ],
)
def test_a_wrong_option_is_one_sentence_with_a_hint(words, sentence, capsys):
    lines = refusal(capsys, *words.split())
    assert len(lines) == 2 and lines[0].startswith(f"error: {sentence}")
    assert lines[1].startswith("mmtensorar ") and lines[1].endswith(" --help shows the options")


@pytest.mark.parametrize(
    "words",
    [
        ["recipe", ""],
        ["plan", ""],
        ["generate", "--ckpt", "", "--prompt", "a"],
        ["generate", "--ckpt", "x", "--prompts-file", ""],
        ["convert", "", "x"],
        ["convert", "x", ""],
        ["shards", "make", "--tars", "", "--out", "x"],
        ["shards", "make", "--csv", "a", "--out", ""],
        ["shards", "check", ""],
        ["eval", "geneval", "--images", ""],
    ],
)
def test_an_empty_word_is_not_the_working_directory(words, capsys):
    """`recipe ""`, of a variable that is not set, printed `.: cannot be read (Is a
    directory)`, and `shards make --tars ""` read all files of the current folder.
    """
    line, _ = refusal(capsys, *words)
    assert "expected a value, got ''" in line


@pytest.mark.parametrize("name", ["file", "file/new", "file/new/newer"])
@pytest.mark.parametrize(
    "words",
    [
        "generate --ckpt x --prompt a --out",
        "image-tokenizer roundtrip a.png --tokenizer x --out",
        "export x --out",
        "merge x",
        "eval geneval --ckpt x --suite shapes --out",
        "shards make --csv a --out",
    ],
)
def test_a_file_is_not_a_folder_to_write(words, name, tmp_path, capsys):
    """`--out FILE` printed `FILE: file exists`, after the model was loaded."""
    (tmp_path / "file").write_text("mine")
    line, _ = refusal(capsys, *words.split(), str(tmp_path / name))
    assert f"{tmp_path / 'file'} is a file; expected a folder" in line
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.launch
def test_mistakes_are_reported_before_torch_is_imported():
    """Importing torch takes seconds, up to a minute on a busy machine; a typing error
    need not wait for it.

    All in one process, in which torch cannot be imported.
    """
    missing = [
        ["train", "nowhere.yaml"],
        ["recipe", "nowhere.yaml"],
        ["plan", "nowhere.yaml"],
        ["generate", "--ckpt", "nowhere", "--prompt", "x"],
        ["generate", "--ckpt", "recipes/tiny/weights/base"],
        ["generate", "--ckpt", "recipes/tiny/weights/base", "--prompts-file", "nowhere"],
        ["convert", "nowhere", "recipes"],
        ["export", "nowhere", "--out", "x"],
        ["merge", "nowhere", "x"],
        ["image-tokenizer", "roundtrip", "nowhere.png", "--tokenizer", "x"],
        ["shards", "make", "--folder", "nowhere", "--out", "x"],
        ["shards", "encode-codes", "nowhere", "--image-tokenizer", "x"],
        ["shards", "encode-text", "nowhere"],
        ["shards", "check", "nowhere"],
        ["shards", "inspect", "nowhere"],
        ["eval", "geneval", "--images", "nowhere"],
        ["eval", "dpg", "--ckpt", "nowhere", "--bench", "x"],
        ["eval", "fid", "--images", "nowhere", "--ref", "x"],
        ["study", "run", "nowhere.yaml"],
    ]
    wrong = [[*verb.split(), option] for verb in cli.VERBS for option in ("--help", "--xyzzy")]
    code = f"""
import sys
from mmtensorar import cli
sys.modules["torch"] = None
for words in {[*wrong, *missing]!r}:
    try:
        code = cli.main(words)
    except SystemExit as ended:
        code = ended.code
    assert code == (0 if "--help" in words else 2), (words, code)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == len(cli.VERBS) + len(missing)


def test_only_the_first_rank_prints_a_wrong_option(capsys, monkeypatch):
    """Under a launcher all ranks read the same command line; eight copies of a sentence
    hide it.
    """
    monkeypatch.setenv("RANK", "3")
    assert refusal(capsys, "shards", "encode-codes", "--xyzzy") == []


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_without_a_verb_all_verbs_are_listed(words, capsys):
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed and verb.about in printed for name, verb in cli.VERBS.items())


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
