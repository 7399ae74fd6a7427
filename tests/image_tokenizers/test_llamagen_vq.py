"""LlamaGen's image tokenizers: official files load, wrong files are refused, and codes
survive saving and loading.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmtensorar import image_tokenizers
from mmtensorar.image_tokenizers import llamagen_vq
from tests.helpers.fakes import tiny_llamagen_vq


@pytest.fixture(scope="module")
def vq() -> llamagen_vq.LlamaGenVQ:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return tiny_llamagen_vq()


def load(path: Path, **settings) -> llamagen_vq.LlamaGenVQ:
    return image_tokenizers.load(llamagen_vq.Config(name="llamagen_vq", path=str(path), **settings))


def state_of(vq) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in vq.model.state_dict().items()}


def test_sizes(vq):
    assert (vq.image_size, vq.grid, vq.factor_sizes) == (8, (4, 4), (16,))


def test_codes_are_the_nearest_rows(vq):
    """A picture made of codebook rows is quantised: the nearest row of every row is
    itself, whatever its stored length.
    """
    with torch.no_grad():
        codes = torch.arange(16).view(1, 4, 4)
        features = vq.model.quantize(codes)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(1, 4, 4))
        lengths = torch.linspace(0.1, 9, 16).view(1, 1, 4, 4)
        assert torch.equal(vq.model.quantize.nearest(features * lengths), codes.flatten(1))


@pytest.mark.parametrize("released", ["VQ-16", "VQ-8"])
def test_released_sizes(released):
    """The official parameter counts.

    The architecture is recognised from the shapes of the tensors alone.
    """
    levels, parameters = {"VQ-16": ([1, 1, 2, 2, 4], 71_883_403), "VQ-8": ([1, 2, 2, 4], 70_109_835)}[
        released
    ]
    expected = llamagen_vq.Architecture(encoder_ch_mult=levels, decoder_ch_mult=levels)
    with torch.device("meta"):
        model = llamagen_vq.VQModel(expected)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert llamagen_vq.inferred(shapes, Path("x")) == expected
    assert expected.downsample == int(released[3:])


@pytest.mark.parametrize("wrapper", ["ema", "model", "state_dict", None])
def test_official_files_load(vq, wrapper, tmp_path):
    """Files load under any of their keys, ema before model, and with the usage record,
    which nothing depends on.
    """
    state = state_of(vq) | {llamagen_vq.USAGE: torch.zeros(65536)}
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    content = (
        {"model": other} | {"ema": state} if wrapper == "ema" else {wrapper: state} if wrapper else state
    )
    torch.save(content, tmp_path / "vq.pt")
    found = load(tmp_path / "vq.pt", image_size=8)
    assert found.weight_hash == vq.weight_hash and found.model.config == vq.model.config


def test_wrong_files_are_refused_by_name(vq, tmp_path):
    path = tmp_path / "vq.pt"

    def refused(problem: str, image_size: int | None = 8, **changes: Tensor | None) -> None:
        state = state_of(vq) | {name.replace("__", "."): value for name, value in changes.items()}
        torch.save({"model": {name: value for name, value in state.items() if value is not None}}, path)
        with pytest.raises(ValueError, match=problem):
            load(path, image_size=image_size)

    refused("image_tokenizer.image_size: .*vq.pt", None)
    refused("image_tokenizer.image_size is 9; expected a multiple of 2", 9)
    refused(r"vq\.pt: 1 tensor is missing, quant_conv\.bias", quant_conv__bias=None)
    refused(r"vq\.pt: 1 tensor is unexpected, loss\.weight", loss__weight=torch.zeros(1))
    refused(
        "not a LlamaGen tokenizer: quantize.embedding.weight is missing", quantize__embedding__weight=None
    )
    refused(
        r"decoder\.conv_out\.bias has shape \[4\], expected \[3\]", decoder__conv_out__bias=torch.zeros(4)
    )
    vq.save_pretrained(tmp_path / "folder")
    with pytest.raises(ValueError, match="image_size is 16, but .*folder is for 8 pixels"):
        load(tmp_path / "folder", image_size=16)
    settings = json.loads((tmp_path / "folder" / "config.json").read_text())
    (tmp_path / "folder" / "config.json").write_text(json.dumps(settings | {"ch": "wide"}))
    with pytest.raises(ValueError, match=r"config\.json: ch: "):
        load(tmp_path / "folder")
