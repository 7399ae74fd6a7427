"""GenEval's detector: mmdet's scores, boxes and masks on hand-made logits; the pipeline
on tiny models.
"""

import copy
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from eval.geneval import convert_detector, mask2former, self_test
from eval.geneval.mask2former import Instances, fitted, instances, nonsense, prepare
from eval.geneval.score import COLORS
from worlds.shapes.detect import Detection

HOT = 50.0  # a logit whose probability is 1


def logits_of(*probabilities) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def test_the_score_is_the_class_times_the_mean_inside_the_mask():
    """Two queries, two classes and "no object" give four instances.

    The mask of a query is used for both classes.
    """
    classes = logits_of([0.6, 0.3, 0.1], [0.2, 0.2, 0.6])
    masks = torch.full((2, 4, 4), -HOT)
    masks[0, 1:3, 1:4] = HOT
    masks[1, 0, 0] = np.log(3)  # probability 3/4
    found = instances(classes, masks, (4, 4), (4, 4), (4, 4))
    rows = {
        (label, tuple(box)): score
        for label, box, score in zip(*(part.tolist() for part in found[:3]), strict=True)
    }
    assert rows.keys() == {(0, (1, 1, 4, 3)), (1, (1, 1, 4, 3)), (0, (0, 0, 1, 1)), (1, (0, 0, 1, 1))}
    assert rows[0, (1, 1, 4, 3)] == pytest.approx(0.6, abs=1e-5) and rows[1, (1, 1, 4, 3)] == pytest.approx(
        0.3, abs=1e-5
    )
    assert rows[0, (0, 0, 1, 1)] == pytest.approx(0.2 * 0.75, abs=1e-5)
    assert sorted(found.masks.sum((1, 2)).tolist()) == [1, 1, 6, 6]


def test_an_empty_mask_gives_zeros():
    found = instances(logits_of([0.9, 0.1]), torch.full((1, 2, 2), -1.0), (2, 2), (2, 2), (2, 2))
    assert found.boxes.tolist() == [[0, 0, 0, 0]] and found.scores.tolist() == [0]


def test_padding_is_cut_off_before_the_mask_gets_the_pictures_size():
    """The right half of the padded input is padding: detections there are nowhere in
    the picture.
    """
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
    """Sizes as mmcv's: 512 x 512 -> 800 x 800; a long picture is limited to 1333;
    padding is grey 128.
    """
    assert (
        fitted(512, 512) == (800, 800)
        and fitted(1000, 500) == (667, 1333)
        and fitted(500, 1000) == (1333, 667)
    )
    assert fitted(3000, 1) == (1, 1333)
    pixels, size = prepare([Image.new("RGB", (120, 90), (255, 0, 128))])
    assert size == (800, 1067) and pixels.shape == (1, 3, 800, 1088)
    expected = [(255 - 123.675) / 58.395, (0 - 116.28) / 57.12, (128 - 103.53) / 57.375]
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor(expected))
    grey = [(128 - mean) / std for mean, std in zip(mask2former.MEAN, mask2former.STD, strict=True)]
    torch.testing.assert_close(pixels[0, :, -1, -1], torch.tensor(grey))


def test_nonsense_detections_are_reported():
    """A broken kernel once gave scores for nonsense, and people used them."""
    parts = torch.zeros(3, dtype=torch.int64), torch.zeros(3, 4)
    masks = torch.zeros(3, 2, 2, dtype=torch.bool)
    assert nonsense(Instances(*parts, torch.tensor([0.1, 0.2, 0.3]), masks)) is None
    assert nonsense(Instances(*parts, torch.zeros(3), masks)) is None, "an empty picture"
    assert "one score, 0.3" in nonsense(Instances(*parts, torch.full((3,), 0.3), masks))
    assert "not finite" in nonsense(Instances(*parts, torch.tensor([0.1, torch.nan, 0.3]), masks))


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
    """A Mask2Former of 80 classes and 100 queries, with random weights."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    backbone = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
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


@pytest.mark.parametrize(
    "content, reason",
    [(b"no weights", "not a file that torch.save wrote"), (b"", "it ends early"), (None, "a pathlib.")],
)
def test_a_wrong_file_for_the_colours_is_one_sentence(tmp_path, monkeypatch, content, reason):
    """PyTorch's message advised to run the code in the file."""
    open_clip = pytest.importorskip("open_clip")
    from eval.geneval.colors import ColorClassifier

    def read(name, pretrained):
        return torch.load(pretrained, weights_only=True)

    monkeypatch.setattr(open_clip, "create_model_and_transforms", read)
    path = tmp_path / "clip.pt"
    torch.save({"a": tmp_path}, path) if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=f"--clip: .*clip.pt cannot be loaded .*{reason}") as error:
        ColorClassifier.load(str(path), device=torch.device("cpu"))
    assert "weights_only" not in str(error.value)


def test_the_pipeline_runs_from_pictures_to_scores(folder, classifier, tmp_path, monkeypatch, capsys):
    """Suite geneval on pictures of two prompts: both get a verdict, and the summary
    names the models.
    """
    from eval.geneval import __main__ as command
    from eval.geneval.colors import ColorClassifier
    from eval.geneval.prompts import prompts
    from eval.layout import image_path

    torch.set_num_threads(1)
    monkeypatch.setattr(mask2former, "SHORTEST", 64)  # a tiny model needs no large picture
    monkeypatch.setattr(ColorClassifier, "load", lambda pretrained, device: classifier)
    rng = np.random.default_rng(0)
    for number, index in enumerate((0, 300)):  # prompts with the tags single_object and colors
        for image in range(2):
            path = image_path(tmp_path / "images", number, image)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(256, size=(48 + 8 * image, 64, 3), dtype=np.uint8)).save(path)
        (path.parent.parent / "metadata.jsonl").write_text(json.dumps(prompts()[index]) + "\n")
    arguments = [
        "--images",
        str(tmp_path / "images"),
        "--suite",
        "geneval",
        "--detector",
        str(folder),
        "--device",
        "cpu",
    ]
    assert command.main(arguments) == 2
    assert "fails the self-test: it sees nothing in any of 3 drawings" in capsys.readouterr().err, (
        "random weights"
    )
    arguments += ["--no-self-test", "--num-images", "2"]
    assert command.main(arguments) == 2
    assert "00002 is missing, the folder of prompt 2 of 553" in capsys.readouterr().err
    assert command.main([*arguments, "--allow-partial"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "images" / "results.jsonl").read_text().splitlines()]
    assert [row["tag"] for row in rows] == ["single_object"] * 2 + ["colors"] * 2
    assert all(
        len(row["detections"]) == 100 and json.loads(row["metadata"])["tag"] == row["tag"] for row in rows
    )
    summary = json.loads((tmp_path / "images" / "summary.json").read_text())
    assert summary["images_expected"] == 553 * 2 and summary["partial"] and summary["self_test"] == "left out"
    assert (
        summary["num_images"] == 4
        and str(folder) in summary["detector"]
        and "colours tiny" in summary["detector"]
    )


# ---- self-test -----------------------------------------------------------------------------------


class Seeing:
    """A detector for self_test: it returns prepared objects, by the number of the
    picture in the batch.
    """

    name, device = "seeing", torch.device("cpu")

    def __init__(self, *seen: list[Detection], alone: list[Detection] | None = None):
        self.seen, self.alone = seen, alone

    def detect_batch(self, images, colored):
        return list(self.seen[: len(images)]) if len(images) > 1 else [self.alone or self.seen[0]]


def sees(label: str, score: float = 0.9, color: str | None = None) -> list[Detection]:
    return [Detection(label, (0, 0, 9, 9), score, color), Detection("cat", (0, 0, 9, 9), 0.1)]


def test_a_detector_that_sees_nothing_or_too_much_is_refused():
    right = sees("stop sign", color="red"), sees("clock", color="white"), sees("traffic light")
    assert self_test.run(Seeing(*right, []))["recognised"] == 3
    others = sees("stop sign", color="blue"), sees("cat"), sees("traffic light", 0.2)
    assert self_test.run(Seeing(*others, []))["recognised"] == 0, (
        "drawings that are not known are told, not refused"
    )
    with pytest.raises(ValueError, match="nothing in any of 3 drawings, the best score is 0.3"):
        self_test.run(Seeing(*[sees("cat", 0.3)] * 3, []))
    with pytest.raises(ValueError, match="20 objects in an empty picture"):
        self_test.run(Seeing(*right, sees("cat")[:1] * 20))
    with pytest.raises(ValueError, match="scores differ by 0.2 between a batch and alone"):
        self_test.run(Seeing(*right, [], alone=sees("stop sign", 0.7)))


def test_the_drawings_show_the_requested_colours():
    """Three different pictures, with the requested colours in the middle of the
    object.
    """
    tests = self_test.drawings()
    assert len({test.image.tobytes() for test in tests}) == 3 and all(
        test.image.size == (512, 512) for test in tests
    )
    sign, clock, _ = (np.asarray(test.image) for test in tests)
    assert sign[120, 256].tolist() == [193, 20, 30] and clock[180, 200].tolist() == [250, 250, 248]


def test_a_device_with_different_results_is_reported(folder, classifier, monkeypatch):
    """The device is the CPU itself here, with weights that change on the way."""
    monkeypatch.setattr(mask2former, "SHORTEST", 64)
    names = [str(number) for number in range(80)]
    detector = mask2former.Mask2FormerDetector.load(str(folder), names, classifier, torch.device("cpu"))
    picture = self_test.drawings()[0].image.resize((64, 64))
    assert self_test._difference_from_cpu(detector, picture) == 0
    other = copy.deepcopy(detector.model)
    with torch.no_grad():
        other.class_predictor.weight.mul_(30)
    monkeypatch.setattr(self_test.copy, "deepcopy", lambda model: other)
    assert self_test._difference_from_cpu(detector, picture) > self_test.TOLERANCE


# ---- mmdet's weights -----------------------------------------------------------------------------


def as_mmdet(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A transformers state dict under mmdet's names and in its layouts."""
    pixel, transformer = "model.pixel_level_module.", "model.transformer_module."
    inverse = [
        (pixel + "encoder.swin.embeddings.patch_embeddings.", "backbone.patch_embed."),
        (pixel + "encoder.swin.embeddings.norm.", "backbone.patch_embed.norm."),
        (pixel + "encoder.swin.encoder.layers.", "backbone.stages."),
        (".layernorm_before.", ".norm1."),
        (".layernorm_after.", ".norm2."),
        (".attention.o_proj.", ".attn.w_msa.proj."),
        (".attention.relative_position_bias.", ".attn.w_msa."),
        (".mlp.fc1.", ".ffn.layers.0.0."),
        (".mlp.fc2.", ".ffn.layers.1."),
        (pixel + "decoder.encoder.", "panoptic_head.pixel_decoder.encoder."),
        (pixel + "decoder.level_embed", "panoptic_head.pixel_decoder.level_encoding.weight"),
        (pixel + "decoder.mask_projection.", "panoptic_head.pixel_decoder.mask_feature."),
        (pixel + "decoder.adapter_1.0.", "panoptic_head.pixel_decoder.lateral_convs.0.conv."),
        (pixel + "decoder.adapter_1.1.", "panoptic_head.pixel_decoder.lateral_convs.0.gn."),
        (pixel + "decoder.layer_1.0.", "panoptic_head.pixel_decoder.output_convs.0.conv."),
        (pixel + "decoder.layer_1.1.", "panoptic_head.pixel_decoder.output_convs.0.gn."),
        (transformer + "queries_embedder.", "panoptic_head.query_embed."),
        (transformer + "queries_features.", "panoptic_head.query_feat."),
        (transformer + "level_embed.", "panoptic_head.level_embed."),
        (transformer + "decoder.layernorm.", "panoptic_head.transformer_decoder.post_norm."),
        (transformer + "decoder.layers.", "panoptic_head.transformer_decoder.layers."),
        ("class_predictor.", "panoptic_head.cls_embed."),
        (".cross_attn.", ".attentions.0.attn."),
        (".cross_attn_layer_norm.", ".norms.0."),
        (".fc1.", ".ffns.0.layers.0.0."),
        (".fc2.", ".ffns.0.layers.1."),
    ]
    found = {}
    for name, value in state.items():
        if name.startswith(("criterion.", pixel + "encoder.swin.layernorm.")):
            continue
        for ours, theirs in inverse:
            name = name.replace(ours, theirs)
        name = re.sub(
            r"^model.*hidden_states_norms\.stage(\d)", lambda m: f"backbone.norm{int(m[1]) - 1}", name
        )
        name = re.sub(
            r"^model.*input_projections\.(\d)\.0", r"panoptic_head.pixel_decoder.input_convs.\1.conv", name
        )
        name = re.sub(
            r"^model.*input_projections\.(\d)\.1", r"panoptic_head.pixel_decoder.input_convs.\1.gn", name
        )
        name = re.sub(
            r"^model.*mask_embedder\.(\d)\.0", lambda m: f"panoptic_head.mask_embed.{2 * int(m[1])}", name
        )
        decoder = name.startswith("panoptic_head.transformer_decoder")
        name = name.replace(".self_attn_layer_norm.", ".norms.1." if decoder else ".norms.0.")
        name = name.replace(".final_layer_norm.", ".norms.2." if decoder else ".norms.1.")
        name = name.replace(".self_attn.", ".attentions.1.attn." if decoder else ".attentions.0.")
        if ".downsample." in name:  # [..., position column by column, C] -> [..., C, position row by row]
            value = value.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].transpose(-1, -2).flatten(-2)
        if part := re.search(r"\.([qkv])_proj\.", name):
            whole = (
                name.replace(part[0], ".in_proj_")
                if decoder
                else name.replace("attention" + part[0], "attn.w_msa.qkv.")
            )
            found.setdefault(whole, []).append((" qkv".index(part[1]), value))
        else:
            found[name] = value
    return {
        name: torch.cat([each for _, each in sorted(value, key=lambda pair: pair[0])])
        if isinstance(value, list)
        else value
        for name, value in found.items()
    }


@pytest.fixture
def mmdet_file(folder, tmp_path):
    from transformers import Mask2FormerForUniversalSegmentation

    state = as_mmdet(Mask2FormerForUniversalSegmentation.from_pretrained(folder).state_dict())
    assert not [name for name in state if not name.startswith(("backbone.", "panoptic_head."))]
    state["backbone.stages.0.blocks.0.attn.w_msa.relative_position_index"] = torch.zeros(
        16, 16, dtype=torch.long
    )
    torch.save({"meta": {"epoch": 50}, "state_dict": state}, tmp_path / "mmdet.pth")
    return tmp_path / "mmdet.pth"


def test_mmdet_weights_become_the_same_model(folder, mmdet_file, tmp_path):
    from transformers import Mask2FormerForUniversalSegmentation

    assert convert_detector.main([str(mmdet_file), "--out", str(tmp_path / "out")]) == 0
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (
            Mask2FormerForUniversalSegmentation.from_pretrained(path)(pixels)
            for path in (folder, tmp_path / "out")
        )
    torch.testing.assert_close(one.class_queries_logits, other.class_queries_logits)
    torch.testing.assert_close(one.masks_queries_logits, other.masks_queries_logits)


def test_patches_are_merged_as_by_unfolding():
    """mmdet unfolds 2 x 2 positions; transformers' module with the converted weights
    computes the same.
    """
    from transformers.models.swin.modeling_swin import SwinPatchMerging

    torch.manual_seed(0)
    picture, norm, weight = torch.randn(1, 6, 4, 8), torch.randn(2, 24), torch.randn(12, 24)  # C = 6
    unfolded = torch.nn.functional.unfold(picture, 2, stride=2).transpose(1, 2)  # [1, positions, C * 4]
    theirs = torch.nn.functional.layer_norm(unfolded, (24,), *norm) @ weight.T
    merging = SwinPatchMerging(6)
    names = ("norm.weight", "norm.bias", "reduction.weight")
    merging.load_state_dict(
        {n: convert_detector._merged(v) for n, v in zip(names, (*norm, weight), strict=True)}
    )
    ours = merging(picture.flatten(2).transpose(1, 2), (4, 8))
    torch.testing.assert_close(ours, theirs)


def test_files_that_are_not_an_mmdet_mask2former_are_refused(mmdet_file, tmp_path, capsys):
    whole = torch.load(mmdet_file, weights_only=True)["state_dict"]
    lacking = {name: value for name, value in whole.items() if "query_feat" not in name}
    fewer = {name: value for name, value in whole.items() if "norms.1.bias" not in name}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for state, out, sentence in (
        (whole | {"neck.weight": torch.zeros(1)}, "out", "neck.weight is not a tensor"),
        (lacking, "out", "panoptic_head.query_feat.weight is missing"),
        (fewer, "out", "2 tensors do not fit"),
        (
            whole | {"panoptic_head.query_feat.weight": torch.zeros(())},
            "out",
            "do not have the shapes of mmdet's Mask2Former",
        ),
        (whole, "full", "full is not empty"),
    ):
        torch.save({"state_dict": state}, mmdet_file)
        assert convert_detector.main([str(mmdet_file), "--out", str(tmp_path / out)]) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1, error


# ---- colours and folders -------------------------------------------------------------------------


def test_a_folder_of_other_prompts_is_not_the_suite(tmp_path):
    """A folder that repeats one easy prompt, or has another prompt, is reported; a
    prompt in other words is not.
    """
    from eval.geneval import suites
    from eval.geneval.evaluate import foreign_prompts

    whole = suites.load("geneval", 1)
    files = [[tmp_path / f"{n:05d}" / "samples" / "00000.png"] for n in range(len(whole.prompts))]
    prompts = [prompt | {"prompt": f"A photograph: {prompt['prompt']}"} for prompt in whole.prompts]
    assert foreign_prompts(whole, prompts, files) == []
    told = foreign_prompts(whole, [prompts[0]] * len(prompts), files)
    assert len(told) == 5 and told[0].startswith("00001/metadata.jsonl: not a prompt of suite geneval")


@pytest.mark.parametrize("clause", [{"position": None}, {"position": ["left of", False]}, {"count": True}])
def test_metadata_that_only_looks_right_is_refused(tmp_path, clause):
    from eval.geneval import suites

    include = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1} | clause]
    (tmp_path / "metadata.jsonl").write_text(
        json.dumps({"tag": "position", "prompt": "a", "include": include})
    )
    with pytest.raises(ValueError, match="include 1: expected"):
        suites.read_metadata(tmp_path / "metadata.jsonl", suites.load("geneval"))


def test_colours_are_measured_on_the_object_only(classifier):
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


def test_a_folder_that_is_not_a_detector_is_refused(tmp_path, classifier):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="--detector: .* cannot be loaded as a Mask2Former"):
        mask2former.Mask2FormerDetector.load(str(tmp_path), ["cat"], classifier, torch.device("cpu"))
    with pytest.raises(ValueError, match="--detector: no folder ./none"):
        mask2former.Mask2FormerDetector.load("./none", ["cat"], classifier, torch.device("cpu"))
