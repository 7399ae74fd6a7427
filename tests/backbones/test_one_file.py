"""A backbone or an image tokenizer is one new file: everything else accepts it without
another edit.

The new file is put into a copy of the package made of links, and used in its own
process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mmtensorar

BACKBONE = """
from functools import partial
from typing import Any, Literal

from pydantic import BaseModel
from torch import nn

from mmtensorar.backbones import _published
from mmtensorar.captions.encoders import ClassNumbers
from mmtensorar.checkpoints.released import ReleasedWeights, locate, parse_config, read_config, write_torch
from mmtensorar.model import attention, layers
from mmtensorar.model.conditions import Prefix
from mmtensorar.recipe import BackboneConfig

SIGNATURES = ("tiny_embed.weight",)
MODEL_TYPES = ("one_file",)
IMAGE_TOKENIZER = "one_file_vq"
IMAGE_TOKENIZER_PREFIXES = ("vq.",)


class Config(BackboneConfig):
    name: Literal["one_file"]
    path: str
    attn_implementation: attention.Implementation = "sdpa"


class Architecture(BaseModel):
    dim: int = 16
    prefix_len: int = 1


class Embed(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8, 16)

    def forward(self, codes):
        return self.table(codes[..., 0])


class ClassPrefix(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 16)

    def forward(self, condition, uncond):
        return Prefix(self.table(condition.values.masked_fill(uncond[:, None], 3)), condition.mask)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.output = layers.Linear(16, 8, bias=False)

    @property
    def output_maps(self):
        return (self.output,)

    def states(self, hidden, prev):
        return hidden

    def forward(self, hidden, prev):
        return self.output(hidden)


class OneFile(_published.PublishedBackbone):
    name = "one_file"
    condition = "class"
    default_sampling: dict[str, Any] = {"top_k": 3}
    pixels_per_token = 2
    official_names = {"embed.table.": "tiny_embed."}

    def __init__(self, config, attn_implementation="sdpa"):
        super().__init__(config, grid=2, factor_sizes=(8,), attn_implementation=attn_implementation)
        self.embed, self.prefix, self.head = Embed(), ClassPrefix(), Head()
        self.layers = nn.ModuleList([layers.Block(layers.SelfAttention(16, 2, 2), 16, 24, 1e-5)])
        self.init_weights(self.head.output)

    def forward(self, embeds, mask, cache=None):
        table = layers.rotary_table(1, 4, 8, 10000, embeds.device)
        return self.run_layers(embeds, table, None, cache)


def _found(section):
    folder = locate(section.path, key="backbone.path")
    config = parse_config(Architecture, read_config(folder, *MODEL_TYPES, key="backbone.path"), folder)
    return partial(OneFile, config, section.attn_implementation), folder


def load(section, *, weights=True, device="cpu", sizes_only=False):
    make, folder = _found(section)
    if not weights:
        return _published.build(make, device=device)
    return _published.load(make, folder, device=device, ignore=lambda name: name.startswith("vq."))


def lazy_weights(section):
    make, folder = _found(section)
    return _published.lazy_weights(make, folder, ignore=lambda name: name.startswith("vq."))


def caption_encoder(section):
    return ClassNumbers(3)


def write_original(target, weights, *, image_tokenizer, base):
    write_torch(target, {"model": _published.tensors_of(weights)})
    return "a tiny model"
"""

IMAGE_TOKENIZER = """
from typing import Literal

import torch
from pydantic import BaseModel
from torch import nn

from mmtensorar.checkpoints.released import ReleasedWeights, fill, locate, weight_hash
from mmtensorar.image_tokenizers import FrozenWithConfig
from mmtensorar.recipe import NamedSection

SIGNATURES = ("one_file_rows.weight",)
MODEL_TYPES = ("one_file_vq",)
ORIGINAL_KEY = "model"


class Config(NamedSection):
    name: Literal["one_file_vq"]
    path: str


class OneFileVQ(FrozenWithConfig):
    name = "one_file_vq"

    def __init__(self):
        super().__init__()
        self.image_size, self.grid, self.factor_sizes = 4, (2, 2), (8,)
        self.one_file_rows = nn.Embedding(8, 12)
        self.freeze()
        self.weight_hash = weight_hash(self.state_dict())

    def encode(self, pixels):
        self.check_size(pixels)
        patches = pixels.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        return torch.cdist(patches, self.one_file_rows.weight).argmin(-1)[..., None]

    def decode(self, codes):
        patches = self.one_file_rows(codes[..., 0]).unflatten(-1, (3, 2, 2)).unflatten(1, (2, 2))
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def vectors(self, codes):
        return self.one_file_rows(codes[..., 0])

    def official_tensors(self):
        return self.state_dict()

    def config_settings(self):
        return {}


def load(section):
    source = ReleasedWeights(locate(section.path, key="image_tokenizer.path"), ("model",))
    inside = "vq." if any(name.startswith("vq.") for name in source.shapes) else ""
    image_tokenizer = OneFileVQ()
    fill(image_tokenizer.state_dict(), source, inside.__add__)
    image_tokenizer.weight_hash = weight_hash(image_tokenizer.state_dict())
    return image_tokenizer
"""

# In the other process: release, recognise, convert, recipe, plan, generate, convert
# back.
USE = """
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mmtensorar import backbones, convert, image_tokenizers
from mmtensorar.checkpoints import model_folder, recognise
from mmtensorar.recipe import Recipe, known_names
from mmtensorar.training import plan

torch.manual_seed(0)
torch.set_num_threads(1)
work = Path(sys.argv[1])
assert "one_file" in known_names("backbone") and "one_file_vq" in known_names("image_tokenizer")
file = backbones.file("one_file")
backbone = file.OneFile(file.Architecture())
backbone.save_pretrained(work / "released")
vq = image_tokenizers.file("one_file_vq").OneFileVQ()
tensors = load_file(work / "released" / "model.safetensors")
tensors |= {"vq." + name: value for name, value in vq.official_tensors().items()}
save_file(tensors, work / "released" / "model.safetensors")

assert recognise.find(str(work / "released")).kind == "one_file"
(work / "released" / "config.json").rename(work / "config.json")
assert recognise.find(str(work / "released")).kind == "one_file", "by its tensors"
(work / "config.json").rename(work / "released" / "config.json")
assert convert.main([str(work / "released"), str(work / "model")]) == 0
loaded = model_folder.load(work / "model")
assert loaded.recipe.sampler.top_k == 3 and loaded.image_tokenizer.weight_hash == vq.weight_hash
for name, value in loaded.model.backbone.state_dict().items():
    assert torch.equal(value, backbone.state_dict()[name])
recipe = Recipe.load(work / "model" / "recipe.yaml", ["tensorar.window=2", "tensorar.num_heads=2"])
assert "parameters" in plan.report(recipe)
condition = loaded.caption_encoder(["0", "2"])
codes = torch.zeros(2, 4, 1, dtype=torch.long)
loss = loaded.model.train()(codes, condition, torch.tensor([False, True])).loss
assert loss.isfinite()
pixels = torch.rand(2, 3, 4, 4) * 2 - 1
assert loaded.image_tokenizer.decode(loaded.image_tokenizer.encode(pixels)).shape == pixels.shape
assert convert.main(["--original", str(work / "model"), str(work / "back.pt")]) == 0
assert convert.main(["--original", str(work / "model" / "image_tokenizer"), str(work / "vq.pt")]) == 0
assert convert.main([str(work / "vq.pt"), str(work / "vq")]) == 0, "an image tokenizer alone"
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A folder with a copy of the package, made of links, with one more file in two of
    its subpackages.
    """
    root = tmp_path_factory.mktemp("package")
    source, copy = Path(mmtensorar.__file__).parent, root / "mmtensorar"
    copy.mkdir()
    for path in source.iterdir():
        if path.name in ("backbones", "image_tokenizers"):
            (copy / path.name).mkdir()
            for file in path.glob("*.py"):
                (copy / path.name / file.name).symlink_to(file)
        elif path.name != "__pycache__":
            (copy / path.name).symlink_to(path)
    (copy / "backbones" / "one_file.py").write_text(BACKBONE)
    (copy / "image_tokenizers" / "one_file_vq.py").write_text(IMAGE_TOKENIZER)
    return root


@pytest.mark.launch
def test_one_file_is_enough(package, tmp_path):
    """Its released files are recognised and converted; recipe, plan, loss and the
    conversion back work too.
    """
    environment = os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", USE, str(tmp_path)]
    ran = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
