"""Convert released weights to model folders, and back to their authors' layout.

Everything that differs between models is in their own files
(mmtensorar/model/protocols.py lists it). Neither direction holds more than about one
weights file in memory, except for PyTorch files older than version 1.6, which are read
completely.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mmtensorar import backbones, image_tokenizers
from mmtensorar.checkpoints import model_folder
from mmtensorar.checkpoints.recognise import Source, find, image_tokenizer_at, image_tokenizer_inside
from mmtensorar.checkpoints.released import (
    LazyWeights,
    bytes_bar,
    tensors_bar,
    write_safetensors,
    write_torch,
)
from mmtensorar.files import new_path, sha256
from mmtensorar.model.protocols import ImageTokenizer
from mmtensorar.recipe import NamedSection, Recipe, named_section, strict_yaml

PATHS = ("text_tokenizer", "text_encoder")  # settings of a backbone that may be local paths


# ---- to a model folder ---------------------------------------------------------------------------


def convert(
    path: str,
    folder: Path,
    *,
    kind: str | None = None,
    image_tokenizer: str | None = None,
    image_size: int | None = None,
    **settings: str | None,
) -> str:
    """Make a model folder of a released backbone, or a folder for
    image_tokenizer.path.

    Args:
        path: file, folder or hub id of the released weights.
        folder: to write; it must not exist.
        kind: kind of the weights, if their tensors do not show it.
        image_tokenizer: path of the backbone's image tokenizer, if it is a separate
            file.
        image_size: pixels a side, if the files do not show it.
        settings: of the backbone's section: text_tokenizer, text_encoder,
            caption_cleaning.

    Returns a sentence about the result. Raises ValueError when a file is of the wrong
    kind, or folder exists.
    """
    source = find(path, kind)
    if source.is_image_tokenizer:
        if image_tokenizer is not None:
            raise ValueError(
                f"--image-tokenizer is for a backbone, and {source.path} is itself an image tokenizer"
            )
        return _convert_image_tokenizer(
            source, folder, _section("image_tokenizer", source, image_size=image_size, **settings)
        )
    for name in PATHS:
        if (value := settings.get(name)) and Path(value).exists():
            settings[name] = os.path.abspath(value)
    section = _section("backbone", source, image_size=image_size, **settings)
    return _convert_backbone(source, folder, section, image_tokenizer)


def _convert_image_tokenizer(source: Source, folder: Path, section: NamedSection) -> str:
    with new_path(folder) as partial:
        image_tokenizers.load(section).save_pretrained(partial)
        _record_sources(partial, image_tokenizer=source)
    return f"{folder}: image tokenizer {source.kind}, for image_tokenizer.path"


def _convert_backbone(
    source: Source, folder: Path, section: NamedSection, image_tokenizer: str | None
) -> str:
    weights = backbones.lazy_weights(section)
    weights.check()
    backbone = weights.model
    backbone.check_prompts(section)
    if image_tokenizer is None:
        tokenizer_source = image_tokenizer_inside(source)
    else:
        tokenizer_source = image_tokenizer_at(image_tokenizer)
    tokenizer_section, tokenizer = None, None
    if tokenizer_source is not None:
        takes_size = image_tokenizers.takes_image_size(tokenizer_source.kind)
        size = backbone.image_size if takes_size else None
        tokenizer_section = _section("image_tokenizer", tokenizer_source, image_size=size)
        tokenizer = image_tokenizers.load(tokenizer_section)
        paths = {"image_tokenizer_path": str(tokenizer_source.path), "backbone_path": str(source.path)}
        image_tokenizers.check_fit(tokenizer, backbone, **paths)

    with new_path(folder) as partial:
        partial.mkdir()
        _write_recipe(partial / "recipe.yaml", source.kind, backbone, section, tokenizer_section)
        num_tensors = len(backbone.state_dict())
        tensors = tensors_bar(weights.tensors(), num_tensors, f"{source.kind} to {folder.name}")
        write_safetensors(partial / "backbone", tensors)
        backbone.save_config(partial / "backbone")
        if tokenizer is not None:
            tokenizer.save_pretrained(partial / "image_tokenizer")
        _record_sources(partial, backbone=source, image_tokenizer=tokenizer_source)
        size = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        with bytes_bar(size, "sha256 of what is written") as bar:
            model_folder.write_index(partial, 0, bar.update)
    without = ", without image tokenizer (--image-tokenizer): it makes codes, but no images"
    note = "" if tokenizer is not None else without
    return f"{folder}: model folder of {source.kind}, {backbone.num_tokens} tokens an image{note}"


def _write_recipe(
    path: Path, kind: str, backbone: Any, section: NamedSection, tokenizer_section: NamedSection | None
) -> None:
    """Write the recipe of a converted model: window 1, and the authors' sampler
    settings.
    """
    # Without an image tokenizer, the section names the usual one and a path that does
    # not exist.
    placeholder = {"name": backbones.file(kind).IMAGE_TOKENIZER, "path": "none"}
    recipe = {
        "run": {"name": "converted"},
        "backbone": section.model_dump(),
        "image_tokenizer": tokenizer_section.model_dump() if tokenizer_section else placeholder,
        "tensorar": {"window": 1},
        "data": {"shards": "none", "batch_size": 1},
        "train": {"steps": 1},
        "sampler": backbone.default_sampling,
    }
    path.write_text(strict_yaml.dump(recipe), encoding="utf-8")
    Recipe.load(path).save(path)


def _section(key: str, source: Source, **settings: Any) -> NamedSection:
    """The recipe's section of a source, with the settings that are not None.

    Raises ValueError.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    section, problems = named_section(key, {"name": source.kind, "path": str(source.path)} | given)
    if section is None or problems:
        raise ValueError("; ".join(f"{where}: {text}" for where, text in problems))
    return section


def _record_sources(folder: Path, **sources: Source | None) -> None:
    """Write source.json: kind, path and the SHA-256 of each file that was read."""
    given = {name: source for name, source in sources.items() if source is not None}
    paths = dict.fromkeys(path for source in given.values() for path in source.files)
    with bytes_bar(sum(path.stat().st_size for path in paths), "sha256 of the source") as bar:
        digests = {path: sha256(path, bar.update) for path in paths}
    record = {
        name: {
            "kind": source.kind,
            "path": str(source.path),
            "sha256": {path.name: digests[path] for path in source.files},
        }
        for name, source in given.items()
    }
    (folder / "source.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


# ---- back to the authors' layout -----------------------------------------------------------------


def original(folder: Path, target: Path, *, base: str | None = None, drop_tensorar: bool = False) -> str:
    """Write a model folder, or an image tokenizer's folder, as its authors' code reads
    it.

    Args:
        folder: the model folder, or the folder of an image tokenizer.
        target: file or folder to write; it must not exist.
        base: for Janus, the released model that training began from. None: follow
            backbone.path through the recipes of model folders.
        drop_tensorar: write the backbone of a model whose window is above 1, without
            its codec.

    Returns a sentence about the result. Raises ValueError when it cannot be written or
    target exists.
    """
    if not (folder / model_folder.INDEX).is_file() and (folder / "config.json").is_file():
        return _write_image_tokenizer(folder, target)
    model_folder.check_files(folder)
    recipe = model_folder.saved_recipe(folder)
    window = recipe.tensorar.window
    lost = (
        f"the window encoder and decoder (window {window}), and with them the ability to revise. The "
        "backbone alone predicts one token at a time, with weights that were trained to work with them"
    )
    if window > 1 and not drop_tensorar:
        raise ValueError(
            f"{folder} has tensorar.window {window}, which the original layout cannot store; "
            f"--drop-tensorar writes the backbone alone. This loses {lost}"
        )
    weights: LazyWeights = backbones.lazy_weights(recipe.backbone)
    weights.check()
    image_tokenizer: ImageTokenizer | None = None
    if (folder / "image_tokenizer").is_dir():
        image_tokenizer = image_tokenizers.load(recipe.image_tokenizer)
    written = backbones.file(weights.model.name).write_original(
        target, weights, image_tokenizer=image_tokenizer, base=lambda: base or _base_of(folder)
    )
    return f"{target}: {written}" + (f", without {lost}" if window > 1 else "")


def _write_image_tokenizer(folder: Path, target: Path) -> str:
    source = find(str(folder), key="CKPT")
    file = image_tokenizers.file(source.kind) if source.is_image_tokenizer else None
    if file is None or file.ORIGINAL_KEY is None:
        raise ValueError(
            f"{folder} is a {source.kind}; --original takes model folders, and image tokenizers that their "
            "authors publish as a file"
        )
    image_tokenizer = image_tokenizers.load(_section("image_tokenizer", source))
    write_torch(target, {file.ORIGINAL_KEY: image_tokenizer.official_tensors()})
    return (
        f"{target}: image tokenizer {source.kind} "
        f'(a dictionary with the key "{file.ORIGINAL_KEY}", as the original code reads)'
    )


def _base_of(folder: Path) -> str:
    """The released model where training began: backbone.path, followed through recipes
    of model folders.
    """
    seen = set()
    while folder not in seen:
        seen.add(folder)
        path = model_folder.recorded_backbone_path(folder)
        folder = Path(path).parent
        if Path(path).name != "backbone" or not (folder / model_folder.INDEX).is_file():
            return path
    raise ValueError(
        f"the recipes of {', '.join(map(str, seen))} name each other; give the original Janus as --base"
    )
