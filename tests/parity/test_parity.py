"""The parity command passes on the original's records, and fails on anything else."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.parity import FIXTURES, Unsupported, llamagen, read_tensors, tensors_file
from tests.parity import __main__ as command

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "parity"
FAMILIES = ("llamagen", "janus", "open_magvit2")


def write_case(folder: Path, manifest: dict, tensors: dict[str, Tensor], name: str = "case") -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(manifest))
    return folder


def top_2_of_3() -> tuple[dict, dict[str, Tensor]]:
    """A case that can be worked out by hand: of the probabilities .5, .3, .2 the two
    largest stay.
    """
    close = {"compare": "allclose", "atol": 1e-6, "rtol": 1e-6}
    call = {
        "id": "s0",
        "args": {"logits": "inputs/logits", "temperature": 1.0, "top_k": 2, "top_p": 1.0},
        "outputs": {"outputs/s0/probs": close, "outputs/s0/argmax": {"compare": "equal"}},
    }
    tensors = {
        "inputs/logits": torch.tensor([[0.5, 0.3, 0.2]]).log(),
        "outputs/s0/probs": torch.tensor([[0.625, 0.375, 0.0]]),
        "outputs/s0/argmax": torch.tensor([[0]]),
    }
    return {"format": 1, "family": "llamagen", "kind": "sampler", "config": {}, "calls": [call]}, tensors


def run(*folders: Path) -> int:
    return command.main([str(folder) for folder in folders])


# ---- what was recorded ---------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("fixtures", [FIXTURES, SHARED], ids=["shipped", "shared"])
def test_every_recorded_call_passes(fixtures, capsys):
    """All calls that are not optional, in every case of this repository and of the
    shared folder next to it.
    """
    folders = [fixtures / family for family in FAMILIES]
    if fixtures is SHARED and not SHARED.is_dir():
        pytest.skip("more parity fixtures are not beside this checkout (../shared/parity)")
    code = run(*folders)
    out = capsys.readouterr().out
    assert code == 0, out
    *lines, last = out.splitlines()
    skipped = [line for line in lines if line.endswith("skipped")]
    optional = sum(
        bool(call.get("optional"))
        for folder in folders
        for path in folder.glob("*.json")
        for call in json.loads(path.read_text()).get("calls", [])
    )
    assert len(skipped) <= optional and last.endswith(f" 0 failed, {len(skipped)} optional ones skipped")


@pytest.mark.parity
@pytest.mark.parametrize(
    "case, output, change",
    [
        ("llamagen/gpt_c2i_gqa", "outputs/gen_cfg4_interval8/tokens", 1),
        ("llamagen/gpt_c2i_gqa", "outputs/forward/logits", 1e-3),
        ("open_magvit2/ar_net2net_tiny", "outputs/encode/tokens_post", 1),
        ("llamagen/vq8_small", "outputs/encode/indices", 1),
        ("janus/t2i_tiny_hf", "outputs/train/grad/gen_embed.weight", 1e-3),
        ("janus/t2i_tiny_hf", "outputs/greedy_cfg5/image_uint8", 2),
    ],
)
def test_one_changed_number_fails(case, output, change, tmp_path, capsys):
    """The last value of an output is changed, for every kind of comparison.

    The command exits with 1, and a line names the output.
    """
    source = FIXTURES / f"{case}.json"
    manifest, tensors = json.loads(source.read_text()), read_tensors(tensors_file(source))
    # To be quick, only the calls that the output belongs to and depends on are run.
    wanted = output.split("/")[1]
    manifest["calls"] = [call for call in manifest["calls"] if call["id"] in (wanted, "forward")]
    last = tensors[output].flatten()
    last[-1] = last[-1] - change if last[-1] >= change else last[-1] + change
    folder = write_case(tmp_path / "changed", manifest, tensors, source.stem)
    assert run(folder) == 1
    out = capsys.readouterr().out
    assert f"{output}: " in out and "1 of " in out and " 1 failed" in out


# ---- the command itself --------------------------------------------------------------------------


@pytest.mark.launch
def test_a_case_by_hand(tmp_path, capsys):
    """Run as a user runs it: exit code 0, and a line per call with its comparisons and
    largest difference.
    """
    folder = write_case(tmp_path / "mine", *top_2_of_3())
    (folder / "facts.json").write_text(json.dumps({"about": "no calls, so no case"}))
    words = [sys.executable, "-m", "tests.parity", str(folder)]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    first, last = result.stdout.splitlines()
    assert first.split()[:4] == ["mine/case", "s0", "allclose,", "equal"] and first.endswith("pass")
    assert last == "1 calls passed, 0 failed, 0 optional ones skipped"


@pytest.mark.parametrize(
    "output, value, problem",
    [
        ("outputs/s0/probs", [[0.62, 0.38, 0.0]], "2 of 3 values outside"),
        ("outputs/s0/argmax", [[1]], "1 of 1 values outside"),
        ("outputs/s0/argmax", [0], "shape [1, 1], recorded [1]"),
        ("outputs/s0/probs", [[float("nan"), 0.375, 0.0]], "1 of 3 values outside"),
        ("outputs/s0/probs", [[0.625, 0.375, float("inf")]], "1 of 3 values outside"),
    ],
)
def test_a_difference_fails(output, value, problem, tmp_path, capsys):
    """A record of nan or infinity does not match other values."""
    manifest, tensors = top_2_of_3()
    tensors[output] = torch.tensor(value)
    assert run(write_case(tmp_path / "mine", manifest, tensors)) == 1
    out = capsys.readouterr().out
    assert (
        problem in out
        and "FAIL" in out
        and out.endswith("0 calls passed, 1 failed, 0 optional ones skipped\n")
    )


def test_equal_infinities_are_equal():
    """Filtered logits are minus infinity on both sides."""
    one = torch.tensor([float("-inf"), 1.0])
    rule = {"compare": "allclose", "atol": 0, "rtol": 1e-6}
    assert command.compare("x", one, one.clone(), rule).problem is None
    assert command.compare("x", torch.tensor([0.0, 1.0]), one, rule).problem


def test_only_optional_calls_may_be_left_out(tmp_path, capsys, monkeypatch):
    """A skipped call is not counted as passed, and a call that is not optional
    fails.
    """
    manifest, tensors = top_2_of_3()

    def refuse(subject, call, inputs):
        raise Unsupported("not here")

    monkeypatch.setattr(llamagen, "run", refuse)
    assert run(write_case(tmp_path / "mine", manifest, tensors)) == 1
    assert "not supported: not here" in capsys.readouterr().out
    manifest["calls"][0]["optional"] = True
    assert run(write_case(tmp_path / "mine", manifest, tensors)) == 0
    assert "0 calls passed, 0 failed, 1 optional ones skipped" in capsys.readouterr().out


def test_an_optional_call_that_is_wrong_fails(tmp_path, capsys):
    manifest, tensors = top_2_of_3()
    manifest["calls"][0]["optional"] = True
    tensors["outputs/s0/argmax"] = torch.tensor([[2]])
    assert run(write_case(tmp_path / "mine", manifest, tensors)) == 1


def test_a_missing_output_or_an_exception_of_the_adapter_fails(tmp_path, capsys, monkeypatch):
    folder = write_case(tmp_path / "mine", *top_2_of_3())
    monkeypatch.setattr(llamagen, "run", lambda subject, call, inputs: {})
    assert run(folder) == 1
    assert "the adapter did not return it" in capsys.readouterr().out
    monkeypatch.setattr(llamagen, "run", lambda subject, call, inputs: 1 / 0)
    assert run(folder) == 1
    assert "ZeroDivisionError: division by zero" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"format": 2}, "format is 2, expected 1"),
        ({"family": "banana"}, "family is 'banana', expected one of .*janus.*llamagen"),
        ({"family": "../llamagen"}, "family is '../llamagen'"),
        ({"family": "__main__"}, "family is '__main__'"),
        ({"kind": "banana"}, "kind is 'banana', expected one of gpt, vq, sampler"),
        ({"kind": "gpt"}, "no model can be built without 'model_type'"),
        ({"calls": []}, "calls is empty"),
        ({"calls": [{"id": "s0"}]}, "call s0 has no outputs to compare"),
        ({"calls": [{"outputs": {}}]}, "call 0 has no id"),
    ],
)
def test_a_manifest_that_cannot_be_run_is_refused(change, problem, tmp_path, capsys):
    """Exit code 2 and one sentence, before anything is reported as passed."""
    import re

    manifest, tensors = top_2_of_3()
    assert run(write_case(tmp_path / "mine", manifest | change, tensors)) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and re.search(problem, err), err
    assert "pass" not in out


@pytest.mark.parametrize(
    "rule, problem",
    [
        ({"compare": "about"}, "compare is 'about', expected one of equal, allclose, max_abs_diff"),
        ({"compare": "allclose", "atol": 1e-5}, "rtol is None, expected a number"),
        ({"compare": "max_abs_diff", "max": float("inf")}, "max is inf, expected a number"),
        ({}, "compare is None"),
    ],
)
def test_an_invalid_rule_is_refused(rule, problem, tmp_path, capsys):
    manifest, tensors = top_2_of_3()
    manifest["calls"][0]["outputs"]["outputs/s0/probs"] = rule
    assert run(write_case(tmp_path / "mine", manifest, tensors)) == 2
    assert problem in capsys.readouterr().err


def test_missing_files_are_refused(tmp_path, capsys):
    manifest, tensors = top_2_of_3()
    assert run(tmp_path / "nowhere") == 2
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty") == 2
    folder = write_case(tmp_path / "mine", manifest, tensors)
    del tensors["outputs/s0/probs"]
    assert run(write_case(tmp_path / "less", manifest, tensors)) == 2
    (folder / "case.safetensors").unlink()
    assert run(folder) == 2
    shutil.copy(ROOT / "pyproject.toml", folder / "case.safetensors")
    assert run(folder) == 2
    (folder / "case.json").write_text("{")
    assert run(folder) == 2
    sentences = capsys.readouterr().err.splitlines()
    words = [
        "no such folder",
        "no case in it",
        "outputs/s0/probs is not in case.safetensors",
        *["cannot be read"] * 3,
    ]
    assert len(sentences) == len(words) and all(
        word in line for word, line in zip(words, sentences, strict=True)
    )


def test_every_member_of_a_star_is_compared(tmp_path, capsys, monkeypatch):
    """outputs/x/* stands for all recorded names that begin with outputs/x/; one missing
    or wrong tensor fails the call.
    """
    manifest, tensors = top_2_of_3()
    manifest["calls"][0]["outputs"] = {"outputs/s0/*": {"compare": "max_abs_diff", "max": 0.5}}
    tensors = {
        "inputs/logits": torch.zeros(1),
        "outputs/s0/a": torch.zeros(2),
        "outputs/s0/b.c": torch.ones(2),
    }
    folder = write_case(tmp_path / "mine", manifest, tensors)
    found = {
        "outputs/s0/a": torch.full((2,), 0.4),
        "outputs/s0/b.c": torch.ones(2),
        "outputs/s0/more": torch.ones(1),
    }
    monkeypatch.setattr(llamagen, "run", lambda subject, call, inputs: found)
    assert run(folder) == 0
    found["outputs/s0/b.c"] = torch.full((2,), 0.4)
    assert run(folder) == 1
    del found["outputs/s0/b.c"]
    assert run(folder) == 1


def test_recorded_outputs_reach_a_call_only_when_it_names_them(tmp_path):
    """A decoder receives the recorded codes; no call receives its own answer."""
    manifest, tensors = top_2_of_3()
    (case,) = command.read_cases(write_case(tmp_path / "mine", manifest, tensors))
    assert command.inputs_of(case, manifest["calls"][0]).keys() == {"inputs/logits"}
    named = {"id": "decode", "args": {"codes": "outputs/s0/argmax", "shape": [1]}}
    assert command.inputs_of(case, named).keys() == {"inputs/logits", "outputs/s0/argmax"}


# ---- evaluators ----------------------------------------------------------------------------------

SCORES = ROOT.parent / "shared" / "eval"


@pytest.mark.parity
@pytest.mark.skipif(not SCORES.is_dir(), reason="the evaluator fixtures are not beside this checkout")
@pytest.mark.parametrize("name", ["geneval", "dpg_bench", "class_conditional"])
def test_official_scores_are_equal(name, capsys):
    assert run(SCORES / name) == 0
    equal, total = re.fullmatch(rf"{name}: (\d+) of (\d+) equal\n", capsys.readouterr().out).groups()
    assert equal == total and int(total) > 10


@pytest.mark.parity
@pytest.mark.skipif(not SCORES.is_dir(), reason="the evaluator fixtures are not beside this checkout")
@pytest.mark.parametrize(
    "name, file", [("geneval", "scoring_summary.json"), ("dpg_bench", "scoring_expected.json")]
)
def test_a_changed_official_score_fails(name, file, tmp_path, capsys):
    shutil.copytree(SCORES / name, tmp_path / name)
    text = (tmp_path / name / file).read_text()
    score = {"geneval": '"overall": 0.45542585849932177', "dpg_bench": '"dpg_score": 54.21458262144536'}[name]
    assert score in text
    (tmp_path / name / file).write_text(text.replace(score, score[:-12]))
    assert run(tmp_path / name) == 1
    assert re.search(r"    .*(overall|dpg_score): \d.*, expected", capsys.readouterr().out)


HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
    "question_natural_language\n"
)
YES = {"1": "yes"}


def write_dpg(folder: Path, pic_num: int, lines: list[dict], images: list[str], failed: list[str]) -> None:
    """A made-up fixture: prompt a is answered yes, prompt b yes and no, in each of
    pic_num pictures.

    The first row, the only one of prompt `first`, is skipped by the official script.
    """
    rows = [("first", 1), ("a", 1), ("b", 1), ("b", 2)]
    table = "".join(f"{item},t,,{number},0,x,y,entity - whole (it),Is it?\n" for item, number in rows)
    (folder / "scoring_questions.csv").write_text(HEADER + table)
    for image in range(pic_num):
        lines = [
            *lines,
            {"item_id": "a", "image": image, "answers": YES},
            {"item_id": "b", "image": image, "answers": {"1": "yes", "2": "no"}},
        ]
    (folder / "scoring_answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    category = {"score": 200 / 3, "questions": 3}
    run_of = {
        "name": "made up",
        "pic_num": pic_num,
        "images": ["a", "b", *images],
        "failed": failed,
        "dpg_score": 75.0,
        "l1": {"entity": category},
        "l2": {"entity - whole": category},
        "per_prompt": {
            "a": {"scores": [1.0] * pic_num, "average": 1.0},
            "b": {"scores": [0.5] * pic_num, "average": 0.5},
        },
    }
    (folder / "scoring_expected.json").write_text(json.dumps({"runs": [run_of]}))


@pytest.mark.parametrize(
    "pic_num, lines, images",
    [
        (1, [("ghost", 0, YES)], ["ghost"]),
        (4, [("ghost", image, {}) for image in range(4)], ["ghost"]),
        (4, [("ghost", 0, {})], ["ghost"]),
        (2, [], ["ghost", "7", "b_copy"]),
        (1, [("first", 0, YES)], ["first"]),
        (2, [("z", 0, YES), ("z", 1, {"1": "no"}), ("0", 0, {"9": ""})], ["z", "0", "absent"]),
    ],
    ids=["answered", "empty", "one_picture", "no_lines", "only_in_the_skipped_row", "all_kinds"],
)
def test_pictures_of_unknown_prompts_are_failures(tmp_path, capsys, pic_num, lines, images):
    """The official script finds no questions for such a picture, and prints it as
    failed.

    Ours once left it out of the failures. It may have answers, or none, since nothing
    is asked.
    """
    given = [{"item_id": item, "image": image, "answers": answers} for item, image, answers in lines]
    write_dpg(tmp_path, pic_num, given, images, sorted(images))
    assert run(tmp_path) == 0, capsys.readouterr().out
    equal, total = re.search(r": (\d+) of (\d+) equal\n", capsys.readouterr().out).groups()
    assert equal == total and int(total) > 10
    write_dpg(tmp_path, pic_num, given, images, [])
    assert run(tmp_path) == 1
    assert "made up failed: [" in capsys.readouterr().out


@pytest.mark.parity
@pytest.mark.skipif(not SCORES.is_dir(), reason="the evaluator fixtures are not beside this checkout")
def test_unknown_pictures_among_the_official_cases(tmp_path, capsys):
    """The recorded runs with further pictures of unknown prompts: only the failures
    change.
    """
    folder = shutil.copytree(SCORES / "dpg_bench", tmp_path / "dpg_bench", copy_function=shutil.copyfile)
    expected = json.loads((folder / "scoring_expected.json").read_text())
    for number, each in enumerate(expected["runs"]):
        names = [f"unknown{number}", "!", "synA1"][: number + 1]
        each["images"] = names + each["images"]
        each["failed"] = sorted(names + each["failed"])
    (folder / "scoring_expected.json").write_text(json.dumps(expected))
    assert run(folder) == 0, capsys.readouterr().out


def test_metrics_on_features_are_compared(tmp_path, capsys):
    """Equal sets have no distance, and all points inside.

    An unknown metric cannot be run.
    """
    pytest.importorskip("scipy")
    points = np.arange(10, dtype=np.float32)[:, None] ** 2
    np.savez(tmp_path / "features.npz", ref_pool=points, sample_pool=points)

    def expect(**values) -> int:
        (tmp_path / "expected.json").write_text(json.dumps({"expected": values}))
        return run(tmp_path)

    zero, one = {"value": 0.0, "abs_tol": 1e-9}, {"value": 1.0, "rel_tol": 1e-9}
    assert expect(fid=zero, fid_reversed=zero, fid_ref_with_itself=zero, precision=one, recall=one) == 0
    assert "5 of 5 equal" in capsys.readouterr().out
    assert expect(fid=zero, precision=zero) == 1
    assert "precision: 1.0, expected 0.0" in capsys.readouterr().out
    assert expect(kid=zero) == 2 and expect() == 2
    assert "kid is no metric known here" in capsys.readouterr().err
