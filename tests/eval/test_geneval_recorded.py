"""GenEval's prompts made from their recipe, and scores of recorded detections."""

import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest

from eval.geneval import __main__ as command
from eval.geneval.prompts import CLASSES, prompts
from mmtensorar import files

CASES = Path(__file__).resolve().parents[3] / "shared" / "eval" / "geneval" / "scoring_cases.jsonl.gz"


def test_the_prompts_are_the_official_ones_byte_for_byte():
    """The hashes are those of evaluation_metadata.jsonl and generation_prompts.txt of
    the original repository.
    """
    metadata = "".join(json.dumps(prompt) + "\n" for prompt in prompts())
    assert (
        hashlib.sha256(metadata.encode()).hexdigest()
        == "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
    )
    texts = "".join(prompt["prompt"] + "\n" for prompt in prompts())
    assert (
        hashlib.sha256(texts.encode()).hexdigest()
        == "55b6e3650e980c13daf30569eb666e000faf19bfc2b7b4cbe999fcdb7aa9d680"
    )
    assert len(CLASSES) == len(set(CLASSES)) == 80


def case(**changes) -> dict:
    """Prompt 0 is a photo of a bench."""
    rows = {"bench": [[0, 0, 9, 9, 0.9]]}
    return {"prompt_index": 0, "detections": rows, "colors": {"bench": ["red"]}} | changes


def write(path: Path, *cases: dict) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in cases))
    return path


def score(path: Path, out: Path) -> int:
    return command.main(["score", "--detections", str(path), "--out", str(out)])


def test_recorded_detections_are_scored_and_compared(tmp_path, capsys):
    verdict = {"correct": True, "reason": "", "kept": {"bench": 1}}
    path = write(tmp_path / "cases.jsonl", case(), case(detections={}), case(**verdict))
    assert score(path, tmp_path / "out" / "results.jsonl") == 0
    rows = [row for _, row in files.read_json_lines(tmp_path / "out" / "results.jsonl")]
    assert [row["correct"] for row in rows] == [True, False, True]
    assert (
        rows[1]["reason"] == "expected bench>=1, found 0" and json.loads(rows[1]["metadata"]) == prompts()[0]
    )
    assert "1 of 1 recorded verdicts are equal" in capsys.readouterr().out
    write(path, case(**verdict), case(**verdict | {"kept": {"bench": 2}}))
    assert score(path, tmp_path / "results.jsonl") == 1
    captured = capsys.readouterr()
    assert (
        "line 2: kept: recorded {'bench': 2}, found {'bench': 1}" in captured.err and "1 of 2" in captured.out
    )


@pytest.mark.parametrize(
    "indices, options, lacks",
    [
        ([0, 0, 0], [], "552 missing prompts"),
        (range(80), [], "473 missing prompts"),
        ([*range(552)], [], "1 missing prompt"),
        ([*range(553), 7], [], "552 missing images"),
        ([*range(553), 7], ["--num-images", "1"], "1 surplus image"),
        ([*range(552), 7, 7], ["--num-images", "2"], "551 missing images, 1 surplus image, 1 missing prompt"),
        ([*range(553)], ["--num-images", "4"], "1659 missing images"),
        ([*range(553)], [], None),
        ([*range(553), *range(553)], ["--num-images", "2"], None),
    ],
)
def test_recorded_cases_that_are_not_a_whole_set_are_marked(tmp_path, capsys, indices, options, lacks):
    """Every prompt must have its images: as many as asked for, or as the prompt with
    the most.
    """
    path = write(tmp_path / "cases.jsonl", *(case(prompt_index=index) for index in indices))
    arguments = ["score", "--detections", str(path), "--out", str(tmp_path / "results.jsonl"), *options]
    assert command.main(arguments) == 0
    printed, noted = capsys.readouterr()
    assert ("cases.jsonl (PARTIAL)" in printed) == bool(lacks)
    assert not lacks or f"PARTIAL: cases.jsonl: {lacks}." in printed
    assert bool(lacks) == bool(noted) and (not lacks or f"note: {path}: " in noted)


@pytest.mark.parametrize(
    "changes, noted",
    [
        ({"detections": {"mouse": [[0, 0, 9, 9, 0.9]] * 2}}, "GenEval does not have: 2 'mouse'"),
        (
            {"detections": {"mouse": [[0, 0, 9, 9, 0.9]], "Bench": [[0, 0, 9, 9, 0.9]]}},
            "1 'mouse', 1 'Bench'",
        ),
        ({"options": {"threshold": 0.2, "max_objects": 16}}, "other settings than GenEval's: 1 'threshold'"),
        ({"detections": {"mouse": []}}, None),
        ({"options": {"threshold": 0.3}}, None),
    ],
)
def test_what_is_not_scored_by_genevals_rules_is_named(tmp_path, capsys, changes, noted):
    """COCO's "mouse" is GenEval's "computer mouse": such rows were left out in
    silence.
    """
    whole = [case(prompt_index=index) for index in range(553)]
    path = write(tmp_path / "cases.jsonl", case(**{"colors": {}} | changes), *whole[1:])
    assert score(path, tmp_path / "results.jsonl") == 0
    error = capsys.readouterr().err
    assert f"note: {path}: " in error and noted in error if noted else not error


@pytest.mark.parity
@pytest.mark.skipif(not CASES.is_file(), reason="GenEval's scoring fixtures are not beside the checkout")
def test_the_official_cases_agree(tmp_path, capsys):
    assert score(CASES, tmp_path / "results.jsonl") == 0
    assert "1500 of 1500 recorded verdicts are equal" in capsys.readouterr().out


COLORED = next(index for index, prompt in enumerate(prompts()) if "color" in prompt["include"][0])
COLORED_ROWS = {prompts()[COLORED]["include"][0]["class"]: [[0, 0, 9, 9, 0.9]]}


@pytest.mark.parametrize(
    "changes, problem",
    [
        (
            {"prompt_index": COLORED, "detections": COLORED_ROWS, "colors": {"other": ["red"]}},
            f"colors of .*: prompt {COLORED} asks for a colour",
        ),
        ({"prompt_index": 553}, "prompt_index is 553, expected 0 to 552"),
        ({"prompt_index": True}, "prompt_index is True"),
        ({"detections": {"bench": [[0, 0, 9, 9]]}}, "detections of bench: expected rows"),
        ({"detections": None}, "detections is None, expected an object"),
        ({"detections": {"bench": [[0, 0, 9, 9, "1"]]}}, "detections of bench: expected rows"),
        ({"colors": {"bench": ["red", "red"]}}, "colors of bench: .* each of its 1 rows"),
        ({"colors": {"bench": ["mauve"]}}, "colors of bench: expected one of GenEval's colours"),
        ({"options": {"treshold": 1}}, "'treshold' .*known are threshold"),
        ({"options": {"threshold": "1"}}, "threshold is '1', expected a number"),
    ],
)
def test_a_damaged_case_is_named_and_nothing_is_written(changes, problem, tmp_path, capsys):
    path = write(tmp_path / "cases.jsonl", case(), case(**changes))
    assert score(path, tmp_path / "results.jsonl") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path} line 2: ") and error.count("\n") == 1
    assert re.search(problem, error)
    assert sorted(tmp_path.iterdir()) == [path]


def test_damaged_files_are_named(tmp_path, capsys):
    whole = gzip.compress(json.dumps(case()).encode() * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-9])
    (tmp_path / "no.jsonl").write_text("[]\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\n")
    for name in ("cut.jsonl.gz", "no.jsonl", "empty.jsonl", "deep.jsonl", "latin.jsonl", "absent.jsonl"):
        assert score(tmp_path / name, tmp_path / "results.jsonl") == 2
        error = capsys.readouterr().err
        assert name in error and error.count("\n") == 1
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"detections": {"bench": [[0, 0, 9, 10**400, 0.9]]}}, "expected rows"),
        ({"detections": {"bench": [[0, 0, 9, float("nan"), 0.9]]}}, "expected rows"),
        ({"detections": {"bench": [[0, 0, 9, -1e39, 0.9]]}}, "expected rows"),
        ({"options": {"threshold": 10**400}}, "options: threshold is 1000"),
        ({"options": {"max_objects": 1.5}}, "options: max_objects is 1.5, expected a whole number"),
        ({"prompt_index": 10**400}, "prompt_index is 1000"),
    ],
)
def test_numbers_that_no_detector_writes_are_a_sentence(tmp_path, capsys, changes, sentence):
    path = write(tmp_path / "cases.jsonl", case(), case(**changes))
    assert score(path, tmp_path / "results.jsonl") == 2
    printed = capsys.readouterr().err
    assert f"error: {path} line 2: {sentence}" in printed.replace("detections of bench: ", "")
    assert len(printed) < 500
