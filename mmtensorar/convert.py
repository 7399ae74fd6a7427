"""Released checkpoints into folders of this project, and back into the layout they came in.

    python -m mmtensorar.convert SRC DST [--image-tokenizer PATH] [--image-size PIXELS] [--kind KIND]
    python -m mmtensorar.convert --original CKPT DST [--base PATH] [--drop-tensorar]

SRC: a file or folder as its authors published it, or a Hugging Face id (of one file: OWNER/NAME/FILE). Its kind is
told from its tensors. A backbone becomes a checkpoint of window 1 that `generate --ckpt DST` and `train.init_from`
take; an image tokenizer becomes a folder for `image_tokenizer.path`. Janus and Open-MAGVIT2 hold their image tokenizer,
LlamaGen's is a file of its own. Numbers stay as they are stored; source.json has the SHA-256 of every file read.

--original writes a trained model of window 1 as its authors' code reads it:
    llamagen       a .pt file, {"model": tensors}, which its sampling scripts look for
    open_magvit2   a .ckpt file, {"state_dict": tensors}, with the image tokenizer inside
    janus          a folder in the layout of the Janus it began as (--base, else its recipe's backbone.path), from
                   which come the parts that play no role here: vision tower, its aligner and lm_head
An image tokenizer's folder can be written back too (llamagen_vq, open_magvit2_lfq). Open-MAGVIT2's is written as the
raw weights even where the averaged ones are in use, since a folder of ours holds one of the two.

Neither direction holds more than about one shard in memory (but files older than PyTorch 1.6's format come in whole).
DST appears when it is complete, and is never replaced.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from mmtensorar import backbones, image_tokenizers
from mmtensorar.backbones.llamagen import PIXELS_PER_TOKEN
from mmtensorar.checkpoints import janus_deepseek, model_folder
from mmtensorar.checkpoints.released import (
    TORCH_SUFFIXES,
    Checkpoint,
    Unread,
    locate,
    read_config,
    write,
)
from mmtensorar.files import sha256
from mmtensorar.image_tokenizers import janus_vq, open_magvit2_lfq
from mmtensorar.recipe import Recipe, Section, known_names, named_section

BACKBONES, IMAGE_TOKENIZERS = known_names("backbone"), known_names("image_tokenizer")
WRAPPERS = ("ema", "model", "module", "state_dict")  # of all kinds; here only names are looked at
# A tensor that no other kind's files have -> kind; the first that is there. An Open-MAGVIT2 file holds its tokenizer.
SIGNS = {
    "transformer.pre_emb.weight": "open_magvit2",
    "tok_embeddings.weight": "llamagen",
    "gen_embed.weight": "janus",
    "model.generation_embeddings.weight": "janus",
    "decoder.adaptive.0.gamma.weight": "open_magvit2_lfq",
    "encoder.conv_blocks.0.res.0.conv1.weight": "llamagen_vq",
}
MODEL_TYPES = {name: name for name in (*BACKBONES, *IMAGE_TOKENIZERS)} | {
    janus_deepseek.MODEL_TYPE: "janus",
    "janus_vqgan": "janus_vq",
}
# The settings of the authors' demo scripts, for `generate` without options; all can be given there.
SAMPLERS = {
    ("llamagen", "class"): {"cfg_scale": 4.0, "top_k": 2000},
    ("llamagen", "text"): {"cfg_scale": 7.5, "top_k": 1000},
    ("open_magvit2", None): {"cfg_scale": [4.0, 4.0], "top_p": [0.96, 0.96]},
    ("janus", None): {"cfg_scale": 5.0},
}
# Backbone -> the image tokenizer that its files hold too, and how its tensors' names begin there.
INSIDE = {
    "open_magvit2": ("open_magvit2_lfq", (open_magvit2_lfq.INSIDE_AR,)),
    "janus": ("janus_vq", (janus_vq.INSIDE_JANUS, janus_deepseek.VQ)),
}


class Source(NamedTuple):
    """A released model on this machine."""

    kind: str
    path: Path
    tensors: Checkpoint

    @property
    def files(self) -> list[Path]:
        config = self.path / "config.json"
        return [*self.tensors.files, *([config] if config.is_file() else [])]


def find(path: str, kind: str | None = None, *, key: str = "SRC", option: str = "--kind") -> Source:
    """The released model at a path or Hugging Face id. Raises ValueError when there is none, or its kind is unclear."""
    if (Path(path) / model_folder.INDEX).is_file():
        raise ValueError(
            f"{key}: {path} is a checkpoint of this project already; --original writes such a one back"
        )
    located = Path(os.path.abspath(locate(path, key=key)))
    tensors = Checkpoint(located, WRAPPERS)
    if kind is None and located.is_dir():
        try:
            kind = MODEL_TYPES[read_config(located, *MODEL_TYPES, key=key)["model_type"]]
        except ValueError:
            pass  # official folders may have no config.json, or one that says something else
    kind = kind or next((kind for sign, kind in SIGNS.items() if sign in tensors.shapes), None)
    if kind is None:
        some = ", ".join(sorted(tensors.shapes)[:10]) or "none"
        raise ValueError(
            f"{located}: its tensors are of no model known here ({some}); "
            f"if it is one, name it with {option} ({', '.join([*BACKBONES, *IMAGE_TOKENIZERS])})"
        )
    return Source(kind, located, tensors)


def convert(
    path: str,
    folder: Path,
    *,
    kind: str | None = None,
    image_tokenizer: str | None = None,
    image_size: int | None = None,
    **settings: str | None,
) -> str:
    """Make a folder of this project from a released model; returns what it is, in a sentence.

    image_tokenizer: the path of a backbone's, where it is a file of its own. image_size: pixels a side, where the
    files do not tell it. settings: text_tokenizer, text_encoder and caption_cleaning of the backbone's section. Raises
    ValueError when a file is not what it should be, or folder exists.
    """
    source = find(path, kind)
    if source.kind in IMAGE_TOKENIZERS:
        if image_tokenizer is not None:
            raise ValueError(
                f"--image-tokenizer goes with a backbone, and {source.path} is an image tokenizer itself"
            )
        section = _section("image_tokenizer", source, image_size=image_size, **settings)
        with appearing(folder) as partial:
            image_tokenizers.load(section).save_pretrained(partial)
            _record(partial, image_tokenizer=source)
        return f"{folder}: image tokenizer {source.kind}, for image_tokenizer.path"

    for name in ("text_tokenizer", "text_encoder"):
        if settings.get(name) and Path(settings[name]).exists():
            settings[name] = os.path.abspath(settings[name])
    section = _section("backbone", source, image_size=image_size, **settings)
    unread = backbones.unread(section)
    unread.check()
    if source.kind == "janus":
        if unread.model.text_tokenizer is None:
            raise ValueError(
                f"{source.path} has no tokenizer.json: give a folder that has one as --text-tokenizer"
            )
        backbones.caption_encoder(section)  # which checks it
    tokenizer_source = _inside(source) if image_tokenizer is None else image_tokenizer_at(image_tokenizer)
    tokenizer_section = None
    if tokenizer_source is not None:
        pixels = None
        if tokenizer_source.kind == "llamagen_vq":
            pixels = (
                math.isqrt(unread.model.num_tokens) * PIXELS_PER_TOKEN
            )  # which all LlamaGen backbones are made for
        tokenizer_section = _section("image_tokenizer", tokenizer_source, image_size=pixels)
        loaded = image_tokenizers.load(tokenizer_section)
        paths = dict(image_tokenizer_path=tokenizer_source.path, backbone_path=source.path)
        image_tokenizers.check_fit(loaded, unread.model, **paths)

    condition = getattr(unread.model.config, "condition", None)
    recipe = {
        "run": {"name": "converted"},
        "backbone": section.model_dump(),
        # Without one the name and a path that leads nowhere hold its place.
        "image_tokenizer": tokenizer_section.model_dump()
        if tokenizer_section
        else {"name": INSIDE.get(source.kind, ("llamagen_vq",))[0], "path": "none"},
        "tensorar": {"window": 1},
        "data": {"shards": "none", "batch_size": 1},
        "train": {"steps": 1},
        "sampler": SAMPLERS.get((source.kind, condition), {}),
    }
    with appearing(folder) as partial:
        partial.mkdir()
        (partial / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        Recipe.load(partial / "recipe.yaml").save(partial / "recipe.yaml")
        tensors = _tensors_bar(
            unread.tensors(), len(unread.model.state_dict()), f"{source.kind} to {folder.name}"
        )
        write(partial / "backbone", tensors)
        unread.model.save_config(partial / "backbone")
        if tokenizer_source is not None:
            loaded.save_pretrained(partial / "image_tokenizer")
        _record(partial, backbone=source, image_tokenizer=tokenizer_source)
        size = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        with _bytes_bar(size, "sha256 of what is written") as bar:
            model_folder.write_index(partial, 0, bar.update)
    without = (
        ""
        if tokenizer_source
        else ", without image tokenizer (--image-tokenizer): it makes codes, but no images"
    )
    return f"{folder}: checkpoint of {source.kind}, {unread.model.num_tokens} tokens an image{without}"


def _section(key: str, source: Source, **settings: Any) -> Section:
    given = {name: value for name, value in settings.items() if value is not None}
    section, problems = named_section(key, {"name": source.kind, "path": str(source.path)} | given)
    if problems:
        raise ValueError("; ".join(f"{where}: {text}" for where, text in problems))
    return section


def image_tokenizer_at(path: str, *, option: str = "--kind") -> Source:
    """The image tokenizer at a path or Hugging Face id, alone or in a backbone's files. Raises ValueError like `find`."""
    found = find(path, key="--image-tokenizer", option=option)
    if found.kind in IMAGE_TOKENIZERS:
        return found
    if (inside := _inside(found)) is None:
        raise ValueError(f"--image-tokenizer: {found.path} is a {found.kind} backbone")
    return inside


def _inside(source: Source) -> Source | None:
    kind, starts = INSIDE.get(source.kind, (None, ()))
    return (
        source._replace(kind=kind) if any(name.startswith(starts) for name in source.tensors.shapes) else None
    )


def _record(folder: Path, **sources: Source | None) -> None:
    """Write source.json: kind, path and the SHA-256 of each file."""
    found = {name: source for name, source in sources.items() if source is not None}
    paths = dict.fromkeys(path for source in found.values() for path in source.files)
    with _bytes_bar(sum(path.stat().st_size for path in paths), "sha256 of the source") as bar:
        digests = {path: sha256(path, bar.update) for path in paths}
    record = {
        name: {
            "kind": source.kind,
            "path": str(source.path),
            "sha256": {path.name: digests[path] for path in source.files},
        }
        for name, source in found.items()
    }
    (folder / "source.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


# ---- back ----------------------------------------------------------------------------------------


def original(folder: Path, target: Path, *, base: str | None = None, drop_tensorar: bool = False) -> str:
    """Write a checkpoint, or an image tokenizer's folder, as its authors' code reads it; returns what was done.

    base: for Janus, the original that the model began as. drop_tensorar: write the backbone of a model whose window is
    above 1, without its window encoder and decoder. Raises ValueError when that is not possible or target exists.
    """
    if not (folder / model_folder.INDEX).is_file() and (folder / "config.json").is_file():
        return _original_tokenizer(folder, target)
    model_folder.check_files(folder)
    recipe = model_folder.saved_recipe(folder)
    window, lost = recipe.tensorar.window, ""
    if window > 1:
        lost = (
            f"the window encoder and decoder of window {window}, and with them all revising: what is left predicts one "
            "token at a time, through weights that were trained to work with them"
        )
        if not drop_tensorar:
            raise ValueError(
                f"{folder} has tensorar.window {window}, and the original layout has no place for it; --drop-tensorar "
                f"writes the backbone alone, and loses {lost}"
            )
        lost = f" without {lost}"
    unread = backbones.unread(recipe.backbone)
    unread.check()
    image_tokenizer = None
    if (folder / "image_tokenizer").is_dir():
        image_tokenizer = image_tokenizers.load(recipe.image_tokenizer)
    kind = recipe.backbone.name
    if kind == "janus":
        _original_janus(folder, unread, image_tokenizer, target, base)
        return f"{target}: Janus in its original layout{lost}"
    tensors = dict(unread.tensors())  # they stay on disk until they are used
    if kind == "llamagen":
        _torch_save({"model": tensors}, target)
        return f'{target}: LlamaGen{lost}; a dictionary with the key "model", which the original sampling scripts read'
    if image_tokenizer is not None:
        inside = image_tokenizer.state_dict().items()
        tensors |= {open_magvit2_lfq.INSIDE_AR + name: value for name, value in inside}
    else:
        lost += f"{', and' if lost else ','} without image tokenizer, which the original code expects inside"
    _torch_save({"state_dict": tensors}, target)
    return (
        f'{target}: Open-MAGVIT2{lost}; a dictionary with the key "state_dict", which the original code reads'
    )


def _original_tokenizer(folder: Path, target: Path) -> str:
    source = find(str(folder), key="CKPT")
    wrapper = {"llamagen_vq": "model", "open_magvit2_lfq": "state_dict"}.get(source.kind)
    if wrapper is None:
        raise ValueError(
            f"{folder} is a {source.kind}; --original takes checkpoints, llamagen_vq and open_magvit2_lfq"
        )
    image_tokenizer = image_tokenizers.load(_section("image_tokenizer", source))
    model = image_tokenizer.model if source.kind == "llamagen_vq" else image_tokenizer
    _torch_save({wrapper: model.state_dict()}, target)
    return f'{target}: image tokenizer {source.kind}; a dictionary with the key "{wrapper}", as the original code reads'


def _torch_save(content: dict[str, dict[str, Tensor]], target: Path) -> None:
    if target.suffix not in TORCH_SUFFIXES:
        raise ValueError(f"DST is {target}; expected a file that ends in {', '.join(TORCH_SUFFIXES)}")
    size = sum(value.nbytes for tensors in content.values() for value in tensors.values())
    with (
        appearing(target) as partial,
        _bytes_bar(size, f"writing {target.name}") as bar,
        partial.open("wb") as file,
    ):
        torch.save(content, _Counted(file, bar))


class _Counted:
    """A file whose progress is shown: torch.save takes whatever has these methods."""

    def __init__(self, file, bar: tqdm):
        self.file, self.bar = file, bar

    def write(self, content) -> int:
        self.bar.update(len(content))
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()


def _original_janus(
    folder: Path, unread: Unread, image_tokenizer: Any, target: Path, base: str | None
) -> None:
    """Every tensor and file of the base, with the trained values in the place of the base's."""
    path = base or _base_of(folder)
    try:
        began_as = backbones.unread(named_section("backbone", {"name": "janus", "path": path})[0])
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; give the original Janus as --base") from None
    names = {began_as.rename(name): unread.saved_name(name) for name in unread.model.state_dict()}
    shapes, saved_shapes = began_as.source.shapes, unread.source.shapes
    if not any(name.startswith(("model.vision_model.", "vision_model.")) for name in shapes):
        raise ValueError(
            f"{path} has no vision tower, so it is not a whole Janus; give the original one as --base"
        )
    for name, saved in names.items():
        if shapes.get(name) != saved_shapes[saved]:
            found = f"has shape {shapes[name]} there" if name in shapes else "is not there"
            raise ValueError(
                f"{path} is not what {folder} began as: {name} {found}, expected {saved_shapes[saved]}"
            )
    trained = dict(unread.tensors())  # they stay on disk until they are used
    values = {name: trained[saved] for name, saved in names.items()}
    base_folder = began_as.source.path
    in_transformers = (
        read_config(base_folder, "janus", janus_deepseek.MODEL_TYPE, key="--base")["model_type"] == "janus"
    )
    if image_tokenizer is not None and image_tokenizer.name == "janus_vq":
        vq_name = janus_vq.INSIDE_JANUS.__add__ if in_transformers else janus_deepseek.vq_name
        values |= {vq_name(name): value for name, value in image_tokenizer.model.state_dict().items()}

    widened: list[str] = []

    def merged() -> Iterator[tuple[str, Tensor]]:
        for name, value in _tensors_bar(began_as.source.read(shapes), len(shapes), f"janus to {target.name}"):
            own = values.get(name, value)
            if own.dtype != value.dtype and torch.equal(own.to(value.dtype).to(own.dtype), own):
                own = own.to(value.dtype)
            if own.dtype != value.dtype:
                widened.append(name)
            yield name, own

    with appearing(target) as partial:
        write(partial, merged())
        for file in sorted(base_folder.iterdir()):
            if file.suffix in (".json", ".jinja", ".txt", ".model") and not file.name.endswith(".index.json"):
                shutil.copyfile(file, partial / file.name)
        if not (partial / "tokenizer.json").is_file() and unread.model.text_tokenizer is not None:
            unread.model.text_tokenizer.save_pretrained(partial)
        if widened:
            # Training in float32 gave numbers that the base's type cannot hold; the config's would round them again.
            config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
            _set_dtype(config)
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _set_dtype(config: dict, dtype: str = "float32") -> None:
    """Set the type of weights in a config.json and its parts."""
    if "model_type" in config and not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = dtype
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            config[key] = dtype
        elif isinstance(value, dict):
            _set_dtype(value, dtype)


def _base_of(folder: Path) -> str:
    """backbone.path of a checkpoint's recipe, followed to where training began."""
    seen = set()
    while folder not in seen:
        seen.add(folder)
        path = Recipe.load(folder / "recipe.yaml").backbone.path
        folder = Path(path).parent
        if Path(path).name != "backbone" or not (folder / model_folder.INDEX).is_file():
            return path
    raise ValueError(
        f"the recipes of {', '.join(map(str, seen))} name each other; give the original Janus as --base"
    )


# ---- files ---------------------------------------------------------------------------------------


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A name beside path for a new file or folder, which becomes path when the block ends, and goes when it fails.

    Raises ValueError when path exists.
    """
    if os.path.lexists(path):
        raise ValueError(f"DST: {path} exists already; give another name, or remove it")
    partial = path.with_name(path.name + ".partial")
    _remove(partial)  # of a run that was killed
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        os.rename(partial, path)
    except BaseException:
        _remove(partial)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _tensors_bar(tensors: Iterator[tuple[str, Tensor]], total: int, what: str) -> tqdm:
    return tqdm(tensors, total=total, desc=what, unit="tensor", file=sys.stderr)


def _bytes_bar(size: int, what: str) -> tqdm:
    return tqdm(total=size, desc=what, unit="B", unit_scale=True, file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mmtensorar.convert",
        description="Convert a released checkpoint to a folder of this project, or back.",
    )
    parser.add_argument(
        "source", metavar="SRC", help="released file, folder or hub id; with --original a checkpoint"
    )
    parser.add_argument("target", metavar="DST", type=Path, help="what is made; must not exist")
    group = parser.add_argument_group("to a folder of this project")
    group.add_argument(
        "--kind", choices=[*BACKBONES, *IMAGE_TOKENIZERS], help="what SRC is, if its tensors do not tell"
    )
    group.add_argument(
        "--image-tokenizer", metavar="PATH", help="the backbone's, where SRC holds none (LlamaGen)"
    )
    group.add_argument(
        "--image-size", metavar="PIXELS", type=int, help="a side, of a LlamaGen file that does not tell"
    )
    group.add_argument(
        "--text-tokenizer", metavar="PATH", help="Janus: a folder with tokenizer.json, if SRC has none"
    )
    group.add_argument(
        "--text-encoder", metavar="PATH", help="LlamaGen, text: its T5 (default google/flan-t5-xl)"
    )
    group.add_argument("--caption-cleaning", help="LlamaGen, text: original (default), lower or none")
    back = parser.add_argument_group("back")
    back.add_argument(
        "--original", action="store_true", help="write the checkpoint SRC in its authors' layout"
    )
    back.add_argument(
        "--base", metavar="PATH", help="Janus: the original, for untrained parts (default: the recipe's)"
    )
    back.add_argument(
        "--drop-tensorar", action="store_true", help="of a window above 1, write the backbone alone"
    )
    options = parser.parse_args(arguments)
    forth = {
        name: getattr(options, name)
        for name in (
            "kind",
            "image_tokenizer",
            "image_size",
            "text_tokenizer",
            "text_encoder",
            "caption_cleaning",
        )
    }
    back_only = {"base": options.base, "drop_tensorar": options.drop_tensorar}
    try:
        for name, value in (forth if options.original else back_only).items():
            if value:
                option, which = name.replace("_", "-"), "with" if options.original else "without"
                raise ValueError(f"--{option} has no use {which} --original")
        if os.path.lexists(options.target):
            raise ValueError(f"DST: {options.target} exists already; give another name, or remove it")
        if options.original:
            print(original(Path(options.source), options.target, **back_only))
        else:
            print(convert(options.source, options.target, **forth))
    except (ValueError, OSError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; {options.target} was not made", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
