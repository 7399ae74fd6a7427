"""GenEval's verdict on cases worked out by hand.

test_parity.py shows that it equals the official scorer's verdict on 1,500 recorded
images.
"""

import numpy as np
import pytest

from eval.geneval.score import Settings, by_class, judge, summarize
from eval.intervals import design_effect, wilson

# ---- by hand -------------------------------------------------------------------------------------


def prompt(tag: str, *include: dict, exclude: tuple = ()) -> dict:
    return {"tag": tag, "include": list(include), "exclude": list(exclude), "prompt": ""}


def box(x: float, y: float, score: float = 0.95, side: float = 10) -> list[float]:
    return [x, y, x + side, y + side, score]


def test_the_threshold_is_strict_and_in_float32():
    """float32(0.3) as a double is above 0.3, but must not pass; the next float32 must
    pass.
    """
    metadata = prompt("single_object", {"class": "star", "count": 1})
    assert (
        judge(metadata, {"star": [box(0, 0, 0.30000001192092896)]}, {}).reason == "expected star>=1, found 0"
    )
    assert judge(metadata, {"star": [box(0, 0, 0.30000004172325134)]}, {}).correct


def test_counting_uses_its_own_threshold_and_excludes_more():
    metadata = prompt("counting", {"class": "star", "count": 2}, exclude=({"class": "star", "count": 3},))
    sure, unsure = box(0, 0, 0.95), box(20, 0, 0.85)
    assert judge(metadata, {"star": [sure, unsure]}, {}).reason == "expected star>=2, found 1"
    assert judge(metadata, {"star": [sure, sure]}, {}) == (True, "", {"star": 2})
    assert judge(metadata, {"star": [sure] * 3}, {}).reason == "expected star<3, found 3"
    assert judge(metadata, {"star": [sure, unsure]}, {}, Settings(counting_threshold=0.3)).correct


def test_only_the_best_detections_count_for_color():
    """A red star with a lower score does not help."""
    metadata = prompt("colors", {"class": "star", "count": 1, "color": "red"})
    stars = {"star": [box(0, 0, 0.5), box(20, 0, 0.9)]}
    assert judge(metadata, stars, {"star": ["blue", "red"]}).correct
    assert (
        judge(metadata, stars, {"star": ["red", "blue"]}).reason
        == "expected red star>=1, found 0 red; and 1 blue"
    )


def test_among_equal_scores_the_later_row_comes_first():
    metadata = prompt("colors", {"class": "star", "count": 1, "color": "red"})
    stars = {"star": [box(0, 0, 0.5), box(20, 0, 0.5)]}
    assert judge(metadata, stars, {"star": ["blue", "red"]}).correct
    assert not judge(metadata, stars, {"star": ["red", "blue"]}).correct


@pytest.mark.parametrize(
    "x, y, relations",
    [
        (0, 50, "left of"),
        (100, 50, "right of"),
        (50, 0, "above"),
        (50, 100, "below"),
        # 50 apart on both axes; sizes sum to 20, so 48 are left: 48 / 70.7 = 0.68,
        # above 0.5 on both.
        (0, 0, "left of and above"),
        # 2 apart, and distances up to 0.1 * 20 = 2 do not count: no relation.
        (48, 50, ""),
        # 3 apart: 1 is left, and 1 / 3 = 0.33 by the unshrunk length, so there is no
        # relation either.
        (47, 50, ""),
        (45, 50, "left of"),  # 3 / 5 = 0.6
        (50, 50, ""),  # equal centres
    ],
)
def test_position_by_hand(x, y, relations):
    """Both boxes are 10 x 10; the target's corner is at (50, 50)."""
    detections = {"star": [box(50, 50)], "ring": [box(x, y)]}
    target = {"class": "star", "count": 1}
    for relation in ("left of", "right of", "above", "below"):
        metadata = prompt("position", target, {"class": "ring", "count": 1, "position": [relation, 0]})
        verdict = judge(metadata, detections, {})
        assert verdict.correct == (relation in relations)
        if not verdict.correct:
            assert verdict.reason == f"expected ring {relation} target, found {relations} target"


def test_a_failed_target_is_named():
    metadata = prompt(
        "position", {"class": "star", "count": 1}, {"class": "ring", "count": 1, "position": ["above", 0]}
    )
    assert (
        judge(metadata, {"ring": [box(0, 0)]}, {}).reason
        == "expected star>=1, found 0\nno target for ring to be above"
    )


def test_suppression_and_the_cut_before_it():
    """Two equal boxes and a distant one: suppression leaves two, but max_objects 2
    drops the distant one before that.
    """
    metadata = prompt("two_object", {"class": "star", "count": 2})
    stars = {"star": [box(0, 0, 0.9), box(0, 0, 0.8), box(50, 0, 0.7)]}
    assert judge(metadata, stars, {}).kept == {"star": 3}
    assert judge(metadata, stars, {}, Settings(max_overlap=0.5)).kept == {"star": 2}
    assert judge(metadata, stars, {}, Settings(max_overlap=0.5, max_objects=2)).kept == {"star": 1}


def test_detections_are_grouped_by_class():
    from worlds.shapes.detect import Detection

    rows, colors = by_class(
        [Detection("star", (0, 0, 1, 1), 0.9, "red"), Detection("star", (2, 2, 3, 3), 0.8)]
    )
    assert rows == {"star": [[0, 0, 1, 1, 0.9], [2, 2, 3, 3, 0.8]]} and colors == {"star": ["red", None]}


# ---- intervals -----------------------------------------------------------------------------------


def test_the_wilson_interval_of_known_cases():
    """At 0 of n the upper limit is z^2 / (n + z^2); 50 of 100 is the textbook case."""
    assert wilson(0, 10) == (0.0, pytest.approx(3.8415 / 13.8415, abs=1e-4))
    assert wilson(50, 100) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    low, high = wilson(10, 10)
    assert high == 1.0 and low == pytest.approx(10 / 13.8415, abs=1e-4)
    with pytest.raises(ValueError, match="3 of 2"):
        wilson(3, 2)


def test_equal_images_of_a_prompt_widen_the_interval():
    """Four copies of one verdict hold as much information as one image: a design effect
    of at most 4.

    10 prompts, half right, each four times: the variance of the clusters is
    10/9 * 10 * 4 / 40^2 = 1/36, and the independent variance is 1/4 / 40 = 1/160. Their
    ratio 4.44 is cut to 4.
    """
    copies = [[True] * 4] * 5 + [[False] * 4] * 5
    assert design_effect([copies]) == 4
    mixed = [[True, False, True, False]] * 10  # prompts all alike: never below 1
    assert design_effect([mixed]) == 1
    assert (
        design_effect([[[True] * 4] * 10]) == 4
    )  # nothing to estimate it from, so it takes the largest value
    results = [({"tag": "colors", "prompt": i}, v) for i, verdicts in enumerate(copies) for v in verdicts]
    skill = summarize(results)["skills"]["colors"]
    assert skill["interval"] == list(wilson(5, 10))


def test_overall_is_the_mean_of_skills():
    """8 images of one skill, 2 of the other: (1 + 0) / 2, not 8 / 10.

    The interval is not empty, though both scores are extreme.
    """
    results = [({"tag": "a", "prompt": i}, True) for i in range(8)] + [
        ({"tag": "b", "prompt": i}, False) for i in range(2)
    ]
    overall = summarize(results)["overall"]
    assert overall["accuracy"] == 0.5
    low, high = overall["interval"]
    assert low == pytest.approx(0.5 - (1 - wilson(8, 8)[0]) / 2) and high == pytest.approx(
        0.5 + wilson(0, 2)[1] / 2
    )


def test_no_images_have_no_score():
    with pytest.raises(ValueError, match="no images"):
        summarize([])


def test_the_bootstrap_agrees_with_the_interval():
    """Also where the images of a prompt are alike.

    All skills share one seed, otherwise the interval of overall would be too narrow.
    """
    rng = np.random.default_rng(0)
    results = []
    for skill in ("counting", "colors"):
        for number in range(100):
            right = bool(rng.random() < 0.6)
            results += [({"tag": skill, "prompt": f"{skill} {number}"}, right)] * 4
    found = summarize(results)
    for each in (*found["skills"].values(), found["overall"]):
        assert each["bootstrap"][0] < each["accuracy"] < each["bootstrap"][1]
        np.testing.assert_allclose(each["bootstrap"], each["interval"], atol=0.03)
    assert summarize(results) == found
