"""The shapes world: captions and pictures agree, and the exact detector reads them
back.
"""

from pathlib import Path

import numpy as np
import pytest

from eval.geneval import suites
from eval.geneval.ceiling import measure
from mmtensorar.checkpoints import model_folder
from mmtensorar.pipeline import Generator
from worlds.shapes.detect import ShapesDetector
from worlds.shapes.draw import (
    COLORS,
    SHAPES,
    SKILLS,
    Object,
    Scene,
    draw,
    sample_scene,
)

SHIPPED = Path(__file__).resolve().parents[2] / "recipes/tiny/weights/base"


def found(scene: Scene, image) -> bool:
    detections = ShapesDetector().detect(image)
    if sorted(d.label for d in detections) != sorted(o.shape for o in scene.objects):
        return False
    colors = {d.label: d.color for d in detections}
    return all(o.color is None or colors[o.shape] == o.color for o in scene.objects)


@pytest.mark.shipped
def test_the_detector_confirms_what_was_drawn():
    confirmed = 0
    for index in range(1000):
        rng = np.random.default_rng(index)
        scene = sample_scene(rng)
        confirmed += found(scene, draw(scene, rng))
    assert confirmed >= 990


@pytest.mark.shipped
def test_the_shipped_base_is_complete_small_and_good_enough():
    """It has at most 8 MB; 95 % of the pictures survive its image tokenizer; it
    generates.
    """
    loaded = model_folder.load(SHIPPED)  # compares every file with its sha256
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 8e6
    bounds = measure(suites.load("shapes"), loaded.image_tokenizer, num_images=200)
    assert bounds["ceiling"]["round_trip"]["overall"] >= 0.95
    (image,) = Generator(loaded).images(["a red circle"], [0])
    assert image.size == (64, 64) and len(image.getcolors(64 * 64)) > 1


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_read_in_every_color(shape):
    for index, color in enumerate(COLORS):
        scene = Scene("colors", f"a {color} {shape}", (Object(shape, color),))
        assert found(scene, draw(scene, np.random.default_rng(index)))


def test_an_empty_ground_has_no_objects():
    scene = Scene("single_object", "nothing", ())
    from PIL import Image

    assert ShapesDetector().detect(Image.new("RGB", (64, 64), (140, 140, 140))) == []
    assert scene.objects == ()


def test_metadata_has_the_format_of_geneval():
    """The clause for a position refers to the reference object, which comes first."""
    scene = Scene("position", "a circle left of a star", (Object("circle"), Object("star")), "left of")
    assert scene.metadata["include"] == [
        {"class": "star", "count": 1},
        {"class": "circle", "count": 1, "position": ["left of", 0]},
    ]
    counted = Scene("counting", "two stars", (Object("star"),) * 2).metadata
    assert counted["include"] == [{"class": "star", "count": 2}]
    assert counted["exclude"] == [{"class": "star", "count": 3}]


@pytest.mark.parametrize("skill", SKILLS)
def test_the_same_seed_draws_the_same_picture(skill):
    pictures = []
    for _ in range(2):
        rng = np.random.default_rng(7)
        pictures.append(np.asarray(draw(sample_scene(rng, skill), rng)))
    assert (pictures[0] == pictures[1]).all()


def test_an_unknown_skill_is_refused():
    with pytest.raises(ValueError, match="unknown skill 'spelling'"):
        sample_scene(np.random.default_rng(0), "spelling")
