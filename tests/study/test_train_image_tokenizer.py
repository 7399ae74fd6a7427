"""The image tokenizer's trainer: its recipe is strict, and its output loads as an image
tokenizer.
"""

from pathlib import Path

import pytest
import torch

from data_tools import make_shards
from mmtensorar import image_tokenizers
from study import train_image_tokenizer
from study.train_image_tokenizer import (
    ImageTokenizerRecipe,
    centre_plain,
    crop_on_foreground,
    pixel_weights,
    plain_patches,
)

SHIPPED = Path(__file__).resolve().parents[2] / "recipes/tiny/image_tokenizer.yaml"


def test_a_few_steps_write_an_image_tokenizer(tmp_path, capsys):
    """Trains on crops, then on whole pictures, and writes a folder that the recipes'
    janus_vq loads.
    """
    shards, out = tmp_path / "shards", tmp_path / "out"
    made = ["--synthesize", "shapes", "--num-samples", "8", "--out", str(shards), "--workers", "1"]
    assert make_shards.main(made) == 0
    few = [
        "steps=4",
        "warmup_steps=1",
        "full_steps=1",
        "batch_size=2",
        "crop_batch_size=2",
        "num_embeddings=16",
    ]
    assert train_image_tokenizer.main([str(SHIPPED), f"shards={shards}", f"out={out}", *few]) == 0
    made = image_tokenizers.load(image_tokenizers.section({"name": "janus_vq", "path": str(out)}))
    assert (made.image_size, made.grid, made.factor_sizes) == (64, (8, 8), (16,))
    codes = made.encode(torch.zeros(1, 3, 64, 64))
    assert made.decode(codes).shape == (1, 3, 64, 64)


def test_mistakes_are_sentences(tmp_path, capsys):
    assert train_image_tokenizer.main([str(SHIPPED), "stepz=4"]) == 2
    assert "did you mean steps?" in capsys.readouterr().err
    for setting, expected in {
        "log_every=0": "log_every  expected an integer >= 1",
        "lr=0": "lr  expected a number > 0",
        "warmup_steps=3000": "warmup_steps is 3000, steps is 3000",
        "crop=36": "crop is 36; expected a multiple of 8",
        "crop=128": "crop is 128, image_size is 64",
        "channel_multiplier=[]": "channel_multiplier  expected a list of integers, not empty",
    }.items():
        assert train_image_tokenizer.main([str(SHIPPED), setting]) == 2
        assert expected in capsys.readouterr().err
    assert train_image_tokenizer.main([str(SHIPPED), f"shards={tmp_path}"]) == 2
    assert "has no manifest.json" in capsys.readouterr().err


def test_crops_are_aligned_with_the_codes_and_cover_the_foreground():
    """One bright pixel in the last cell: nearly every crop of 16 contains it, and
    starts on a multiple of 8.
    """
    pixels = torch.arange(64.0).expand(200, 1, 64, 64).clone()
    pixels[:, :, 60, 60] = 1e4
    weights = pixel_weights(pixels.expand(-1, 3, -1, -1) / 1e4, 3.0)
    assert weights.min() == 1 and weights.max() == 3
    torch.manual_seed(0)
    crops = crop_on_foreground(pixels, (pixels > 1e3).float() * 100, 16, 8)
    assert crops.shape == (200, 1, 16, 16)
    assert (crops[:, 0, 0, 0] % 8 == 0).all(), "the first column of a crop starts a code"
    assert (crops.flatten(1).max(1).values == 1e4).float().mean() > 0.2


def test_the_recipe_is_validated():
    with pytest.raises(ValueError):
        ImageTokenizerRecipe(shards="a", out="b", image_size=64, num_embeddings=1, steps=1)


def test_patches_of_one_colour_share_their_features():
    """Two pictures in patches of 2 pixels: grey, compression noise, a white line.

    The grey patches become equal.
    """
    pixels = torch.zeros(2, 3, 4, 4)
    pixels[0, :, 0, 0] = 0.02  # noise
    pixels[1, :, 3, 2:] = 1.0
    colors = plain_patches(pixels, 2)
    assert colors.shape == (2, 2, 2)
    assert (colors == colors[0, 0, 0]).sum() == 7 and colors[1, 1, 1] == -1
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(8, 5), dim=-1)
    centred = centre_plain(features, colors.flatten())
    torch.testing.assert_close(
        centred[:7], torch.nn.functional.normalize(features[:7].sum(0), dim=0).expand(7, -1)
    )
    assert torch.equal(centred[7], features[7])
    assert torch.equal(centre_plain(features, torch.full((8,), -1)), features), (
        "without plain patches nothing changes"
    )
