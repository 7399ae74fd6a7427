"""GenEval's detector: mmdet's scores, boxes and masks on logits worked out by hand; the pipeline on tiny random models."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from eval.geneval import mask2former
from eval.geneval.mask2former import Instances, fitted, instances, plausible, prepare
from eval.geneval.score import COLORS

HOT = 50.0  # a logit whose probability is 1


def logits_of(*probabilities) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def test_the_score_is_the_class_times_the_mean_inside_the_mask():
    """Two queries, two classes and none: four instances. A query's mask serves both its classes."""
    classes = logits_of([0.6, 0.3, 0.1], [0.2, 0.2, 0.6])
    masks = torch.full((2, 4, 4), -HOT)
    masks[0, 1:3, 1:4] = HOT
    masks[1, 0, 0] = np.log(3)  # probability 3/4
    found = instances(classes, masks, (4, 4), (4, 4), (4, 4))
    rows = {(label, tuple(box)): score for label, box, score in zip(*(part.tolist() for part in found[:3]), strict=True)}
    assert rows.keys() == {(0, (1, 1, 4, 3)), (1, (1, 1, 4, 3)), (0, (0, 0, 1, 1)), (1, (0, 0, 1, 1))}
    assert rows[0, (1, 1, 4, 3)] == pytest.approx(0.6, abs=1e-5) and rows[1, (1, 1, 4, 3)] == pytest.approx(0.3, abs=1e-5)
    assert rows[0, (0, 0, 1, 1)] == pytest.approx(0.2 * 0.75, abs=1e-5)
    assert sorted(found.masks.sum((1, 2)).tolist()) == [1, 1, 6, 6]


def test_an_empty_mask_gives_zeros():
    found = instances(logits_of([0.9, 0.1]), torch.full((1, 2, 2), -1.0), (2, 2), (2, 2), (2, 2))
    assert found.boxes.tolist() == [[0, 0, 0, 0]] and found.scores.tolist() == [0]


def test_padding_is_cut_off_before_the_mask_gets_the_pictures_size():
    """The right half of the padded input is padding: what the model sees there is nowhere in the picture."""
    masks = torch.full((1, 4, 8), -HOT)
    masks[0, :, 4:] = HOT
    found = instances(logits_of([0.9, 0.1]), masks, (32, 64), (32, 30), (100, 94))
    assert not found.masks.any()
    masks[0] = HOT
    found = instances(logits_of([0.9, 0.1]), masks, (32, 64), (32, 30), (100, 94))
    assert found.boxes.tolist() == [[0, 0, 94, 100]] and found.scores[0] == pytest.approx(0.9, abs=1e-4)


def test_only_the_likeliest_hundred_pairs_are_instances():
    classes = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    found = instances(classes, torch.full((30, 2, 2), HOT), (2, 2), (2, 2), (2, 2))
    best = classes.softmax(-1)[:, :-1].flatten().sort(descending=True).values[:100]
    torch.testing.assert_close(found.scores.sort(descending=True).values, best, atol=1e-5, rtol=0)


def test_pictures_are_fitted_padded_and_normalised():
    """Sizes as mmcv's: 512 x 512 -> 800 x 800; a long one is bound by 1333; padding is grey 128."""
    assert fitted(512, 512) == (800, 800) and fitted(1000, 500) == (667, 1333) and fitted(500, 1000) == (1333, 667)
    pixels, size = prepare([Image.new("RGB", (120, 90), (255, 0, 128))])
    assert size == (800, 1067) and pixels.shape == (1, 3, 800, 1088)
    expected = [(255 - 123.675) / 58.395, (0 - 116.28) / 57.12, (128 - 103.53) / 57.375]
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor(expected))
    grey = [(128 - mean) / std for mean, std in zip(mask2former.MEAN, mask2former.STD, strict=True)]
    torch.testing.assert_close(pixels[0, :, -1, -1], torch.tensor(grey))


def test_nonsense_is_noticed():
    """A broken kernel once gave people scores for it."""
    parts = torch.zeros(3, dtype=torch.int64), torch.zeros(3, 4)
    masks = torch.zeros(3, 2, 2, dtype=torch.bool)
    assert plausible(Instances(*parts, torch.tensor([0.1, 0.2, 0.3]), masks)) is None
    assert plausible(Instances(*parts, torch.zeros(3), masks)) is None, "an empty picture"
    assert "one score, 0.3" in plausible(Instances(*parts, torch.full((3,), 0.3), masks))
    assert "not finite" in plausible(Instances(*parts, torch.tensor([0.1, torch.nan, 0.3]), masks))


# ---- tiny random models --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier():
    open_clip = pytest.importorskip("open_clip")
    from open_clip.transform import image_transform

    from eval.geneval.colors import MODEL, ColorClassifier

    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg=dict(image_size=32, layers=1, width=32, head_width=16, patch_size=16),
        text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1),
        quick_gelu=True,
    )
    transform = image_transform(32, is_train=False)
    return ColorClassifier(model, transform, open_clip.get_tokenizer(MODEL), "tiny", torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Mask2Former of 80 classes and 100 queries, random."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    backbone = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4, out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=16,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=100,
        num_labels=80,
    )
    path = tmp_path_factory.mktemp("mask2former")
    Mask2FormerForUniversalSegmentation(config).save_pretrained(path)
    return path


def test_the_pipeline_runs_from_pictures_to_scores(folder, classifier, tmp_path, monkeypatch, capsys):
    """Suite geneval on two prompts' pictures, with the real classes; each has its verdict, and the summary names the models."""
    from eval.geneval import __main__ as command
    from eval.geneval.colors import ColorClassifier
    from eval.geneval.prompts import prompts
    from eval.layout import image_path

    torch.set_num_threads(1)
    monkeypatch.setattr(mask2former, "SHORTEST", 64)  # a tiny model needs no large picture
    monkeypatch.setattr(ColorClassifier, "load", lambda pretrained, device: classifier)
    rng = np.random.default_rng(0)
    for number, index in enumerate((0, 300)):  # of the tags single_object and colors
        for image in range(2):
            path = image_path(tmp_path / "images", number, image)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(256, size=(48 + 8 * image, 64, 3), dtype=np.uint8)).save(path)
        (path.parent.parent / "metadata.jsonl").write_text(json.dumps(prompts()[index]) + "\n")
    arguments = ["--images", str(tmp_path / "images"), "--suite", "geneval", "--detector", str(folder), "--device", "cpu"]
    assert command.main(arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "images" / "results.jsonl").read_text().splitlines()]
    assert [row["tag"] for row in rows] == ["single_object"] * 2 + ["colors"] * 2
    assert all(len(row["detections"]) == 100 and json.loads(row["metadata"])["tag"] == row["tag"] for row in rows)
    summary = json.loads((tmp_path / "images" / "summary.json").read_text())
    assert summary["num_images"] == 4 and str(folder) in summary["detector"] and "colours tiny" in summary["detector"]


def test_colours_are_asked_of_the_object_alone(classifier):
    from eval.geneval.colors import alone

    image = Image.new("RGB", (6, 4), "red")
    mask = np.zeros((4, 6), bool)
    mask[1, 2:4] = True
    cut = np.asarray(alone(image, mask, (2.0, 0.0, 4.0, 2.0)))
    assert cut.tolist() == [[[153] * 3] * 2, [[255, 0, 0]] * 2]
    colors = classifier.classify(image, [("cat", mask, (2, 0, 4, 2))] * 3)
    assert len(set(colors)) == 1 and colors[0] in COLORS
    assert classifier.classify(image, []) == []
    torch.testing.assert_close(classifier._text("cat").norm(dim=-1), torch.ones(10))


def test_a_folder_that_is_no_detector_is_refused(tmp_path, classifier):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="--detector: .* cannot be loaded as a Mask2Former"):
        mask2former.Mask2FormerDetector.load(str(tmp_path), ["cat"], classifier, torch.device("cpu"))
    with pytest.raises(ValueError, match="--detector: no folder ./none"):
        mask2former.Mask2FormerDetector.load("./none", ["cat"], classifier, torch.device("cpu"))
