"""What can be checked of a recipe without loading weights: shard folders, paths, the
window.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmtensorar import backbones
from mmtensorar.checkpoints.index import read_index
from mmtensorar.checkpoints.recognise import WRAPPERS
from mmtensorar.checkpoints.released import ReleasedWeights
from mmtensorar.data.shard_mixture import codes_of, text_features_of
from mmtensorar.data.shards import Manifest
from mmtensorar.data.url_cache import is_url
from mmtensorar.model import tensorar
from mmtensorar.recipe import Recipe

# Settings that are a path, or the id of a model on the Hugging Face Hub.
MODELS = {"backbone": ("path", "text_tokenizer"), "image_tokenizer": ("path",)}


def check_files(recipe: Recipe) -> Iterator[str]:
    """A note about each folder or file that is not on this machine, where another one
    may train.

    Nothing is downloaded. Raises ValueError for a folder that is here and that training
    would refuse: shards without a manifest or without image codes, a model folder
    without its index, an image tokenizer without readable weights.
    """
    folders = [("data.shards", folder) for folder in recipe.data.weights]
    if recipe.data.validation is not None:
        folders.append(("data.validation", recipe.data.validation))
    for key, folder in folders:
        if is_url(folder):
            continue
        if not Path(folder).exists():
            yield f"{key}: {folder} does not exist here"
            continue
        manifest = Manifest.read(folder)
        codes_of(manifest, folder)
        if recipe.data.text_features == "cached":
            text_features_of(manifest, folder)
    for section, keys in MODELS.items():
        settings: dict[str, Any] = getattr(recipe, section).model_dump()
        for key in keys:
            path = settings.get(key)
            if path is not None and not Path(path).exists():
                is_id = path.count("/") == 1 and not path.startswith((".", "/", "~"))
                instead = "; it is taken for a model of the Hugging Face Hub" if is_id else ""
                yield f"{section}.{key}: {path} does not exist here{instead}"
    tokenizer: Any = recipe.image_tokenizer
    if Path(tokenizer.path).exists():
        ReleasedWeights(Path(tokenizer.path), WRAPPERS)  # reads the tensors' names alone
    if (start := recipe.train.init_from) is not None:
        if Path(start).exists():
            read_index(start)
        else:
            yield f"train.init_from: {start} does not exist here"


def check_sizes(recipe: Recipe) -> Iterator[str]:
    """A note when the backbone's sizes are not known on this machine.

    Raises ValueError when its folder holds no model, and when the window, the codec's
    heads or the number of prompt tokens do not fit it.
    """
    backbone: Any = recipe.backbone
    window = recipe.tensorar.window
    if not backbone.has_sizes():
        if window > 1:
            yield "tensorar.window: not compared with the backbone, whose sizes are not known here"
        return
    text_tokenizer = getattr(backbone, "text_tokenizer", None)
    if window == 1 and text_tokenizer is not None and not Path(text_tokenizer).exists():
        return  # it would be downloaded
    section = backbone.model_copy(update={"attn_implementation": "sdpa"})  # which needs no GPU
    model = backbones.load(section, weights=False, device="meta", sizes_only=True)
    if window > 1:
        tensorar.build(model, recipe.tensorar)
    needed = [getattr(section, key, None) for key in MODELS["backbone"]]
    if all(path is None or Path(path).exists() for path in needed):
        model.check_prompts(section)
