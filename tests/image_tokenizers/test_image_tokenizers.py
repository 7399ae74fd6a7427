"""Image tokenizers alone: pixels and pictures convert back exactly, and the round trip
gives a picture and its PSNR.
"""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from mmtensorar import image_tokenizers
from mmtensorar import roundtrip as command
from mmtensorar.image_tokenizers import llamagen_vq, to_images, to_pixels


@pytest.fixture(scope="module")
def vq(tmp_path_factory):
    """A random LlamaGen VQ for 8-pixel pictures, with 4 x 4 codes."""
    folder = tmp_path_factory.mktemp("vq") / "llamagen"
    small = dict(
        codebook_size=16, code_dim=4, ch=32, encoder_ch_mult=[1, 1], decoder_ch_mult=[1, 1], num_res_blocks=1
    )
    torch.manual_seed(0)
    model = llamagen_vq.VQModel(llamagen_vq.Architecture(**small, z_channels=8))
    llamagen_vq.LlamaGenVQ(model, 8).save_pretrained(folder)
    return folder


def picture(size=(8, 8)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(256, size=(size[1], size[0], 3), dtype=np.uint8))


def roundtrip(vq, out, *arguments) -> int:
    options = ["--tokenizer", str(vq), "--device", "cpu", "--out", str(out)]
    return command.main(["roundtrip", *options, *map(str, arguments)])


def test_pixels_and_pictures_are_inverse():
    image = picture((6, 4))
    pixels = to_pixels([image, image])
    assert pixels.shape == (2, 3, 4, 6) and pixels.min() >= -1 and pixels.max() <= 1
    assert torch.equal(to_pixels(np.zeros((1, 2, 2, 3), np.uint8)), torch.full((1, 3, 2, 2), -1.0))
    assert all((np.asarray(made) == np.asarray(image)).all() for made in to_images(pixels))


def test_psnr_by_hand():
    """Every value wrong by 51 = 255 / 5 gives 20 log10(5); if only one of three
    channels is wrong, 10 log10(3) more.
    """
    black, grey, blue = (Image.new("RGB", (2, 2), color) for color in ("black", (51, 51, 51), (0, 0, 51)))
    assert command.psnr(black, grey) == pytest.approx(20 * math.log10(5))
    assert command.psnr(black, blue) == pytest.approx(20 * math.log10(5) + 10 * math.log10(3))
    assert command.psnr(black, black) == math.inf


def test_the_round_trip_is_shown_next_to_the_original_with_its_psnr(vq, tmp_path, capsys):
    original = picture()
    original.save(tmp_path / "a.png")
    picture((20, 10)).save(tmp_path / "wide.webp")
    out = tmp_path / "out"
    assert roundtrip(vq, out, tmp_path / "a.png", tmp_path / "wide.webp") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(path.name for path in out.iterdir()) == ["a.roundtrip.png", "wide.roundtrip.png"]
    both = Image.open(out / "a.roundtrip.png")
    left, right = both.crop((0, 0, 8, 8)), both.crop((8, 0, 16, 8))
    assert both.size == (16, 8) and (np.asarray(left) == np.asarray(original)).all()
    section = image_tokenizers.section({"name": "llamagen_vq", "path": str(vq)})
    tokenizer = image_tokenizers.load(section)
    made = to_images(tokenizer.decode(tokenizer.encode(to_pixels([original]))))[0]
    assert (np.asarray(right) == np.asarray(made)).all()
    assert lines[0] == f"{out / 'a.roundtrip.png'}: PSNR {command.psnr(left, right):.2f} dB"
    assert lines[1] == f"{tmp_path / 'wide.webp'}: 20x10, resized and cut to the centre 8x8"
    assert lines[3].startswith("mean PSNR ") and lines[3].endswith(" dB of 2 images")


def test_mistakes_are_sentences(vq, tmp_path, capsys):
    picture().save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "more").mkdir()

    def sentence(*arguments) -> str:
        assert roundtrip(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    out = tmp_path / "out"
    assert "text.png: unreadable image (not a JPEG" in sentence(vq, out, tmp_path / "text.png")
    assert "gone.png" in sentence(vq, out, tmp_path / "gone.png")
    assert "two images are called a" in sentence(vq, out, tmp_path / "a.png", tmp_path / "more" / "a.jpg")
    assert "--image-tokenizer: no folder ./none" in sentence("./none", out, tmp_path / "a.png")
    assert "image_size is 16, but" in sentence(vq, out, tmp_path / "a.png", "--image-size", "16")
    assert "device is 'tpu9'" in sentence(vq, out, tmp_path / "a.png", "--device", "tpu9")
    assert "expected one of janus_vq" in sentence(vq, out, tmp_path / "a.png", "--name", "vq")


@pytest.mark.parametrize("later", ["more/a.png", "more/a.webp", "more/a.bmp"])
def test_a_comparison_of_another_image_is_not_replaced(vq, tmp_path, capsys, later):
    (tmp_path / "more").mkdir()
    picture().save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), "red").save(tmp_path / later)
    out = tmp_path / "out"
    for _ in range(2):  # the same image again
        assert roundtrip(vq, out, tmp_path / "a.png") == 0
    before = (out / "a.roundtrip.png").read_bytes()
    assert roundtrip(vq, out, tmp_path / later) == 2
    assert "exists and shows another image" in capsys.readouterr().err
    assert (out / "a.roundtrip.png").read_bytes() == before


def test_a_refused_image_leaves_no_folder(vq, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    assert roundtrip(vq, tmp_path / "out", tmp_path / "text.png") == 2
    assert not (tmp_path / "out").exists()
