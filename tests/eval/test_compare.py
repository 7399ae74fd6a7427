"""Comparing models on the same prompts: a paired bootstrap, on cases whose answer is
known.
"""

import json
import shutil

import pytest

from eval.geneval import __main__ as command
from eval.geneval.compare import differences


def test_differences_are_paired_by_prompt():
    """Prompts differ in difficulty, and one model is always a quarter better.

    The difference is certain, although no score is.
    """
    easy_and_hard = {f"p{i}": i % 4 / 4 for i in range(40)}
    better = {prompt: share + 0.25 for prompt, share in easy_and_hard.items()}
    found = differences({"a": easy_and_hard}, {"a": better})
    assert found["a"] == found["overall"] == pytest.approx((0.25, 0.25, 0.25))
    assert differences({"a": better}, {"a": better})["overall"] == (0, 0, 0)


def test_overall_is_the_mean_of_the_skills_and_the_interval_grows_with_noise():
    one = {"a": {str(i): 0.0 for i in range(50)}, "b": {"x": 0.0, "y": 0.0}}
    other = {"a": {str(i): float(i % 2) for i in range(50)}, "b": {"x": 1.0, "y": 1.0}}
    difference, low, high = differences(one, other)["overall"]
    assert difference == 0.75 and 0.6 < low < 0.75 < high < 0.9
    # The standard error of 50 coins is 0.0707; the interval reaches 1.96 times that,
    # and half of it counts overall.
    assert high - low == pytest.approx(2 * 1.96 * 0.0707 / 2, rel=0.1)
    with pytest.raises(ValueError, match="prompts differ, number in one of them only: 2, such as x"):
        differences(one, {"a": one["a"]})


def test_the_command_prints_scores_and_differences(tmp_path, capsys):
    from eval.geneval.suites import load
    from eval.layout import image_path

    suite = load("shapes", 1)
    for index, metadata in enumerate(suite.prompts):
        path = image_path(tmp_path / "one", index, 0)
        path.parent.mkdir(parents=True)
        suite.picture(index, 64)[1].save(path)
        (path.parent.parent / "metadata.jsonl").write_text(json.dumps(metadata) + "\n")
    arguments = ["--images", str(tmp_path / "one"), "--suite", "shapes", "--num-bound-images", "0"]
    assert command.main([*arguments, "--num-prompts", "1", "--num-images", "1"]) == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    capsys.readouterr()
    assert (
        command.main(
            ["compare", str(tmp_path / "one"), f"again={tmp_path / 'two'}", "--out", str(tmp_path / "d.json")]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "minus one" in printed and printed.count("+0.0 [+0.0 +0.0]") == 7
    assert json.loads((tmp_path / "d.json").read_text())["differences"]["again"]["overall"] == [0, 0, 0]
    for arguments, sentence in (
        ([tmp_path / "one"], "expected two or more"),
        ([tmp_path / "one", tmp_path / "no"], "no/summary.json"),
    ):
        assert command.main(["compare", *map(str, arguments)]) == 2
        assert sentence in capsys.readouterr().err
