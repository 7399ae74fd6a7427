"""Consolidated checkpoints: one folder that generation and evaluation load without DeepSpeed.

FOLDER/
  recipe.yaml            the resolved recipe of the run
  backbone/              config.json, model.safetensors, text tokenizer files
  tensorar.safetensors   weights of the window encoder and decoder; absent at window 1
  adapters.safetensors   after training with adapters: then backbone/ has no weights, and
  base.json              says where they are, and how to know them again
  image_tokenizer/       config.json, model.safetensors; absent where a conversion was given none
  source.json            of a converted release: kind and sha256 of the files it came from
  checkpoint.json        format version, step, sha256 per file; written last
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmtensorar import backbones, image_tokenizers
from mmtensorar.checkpoints.released import without_values
from mmtensorar.files import sha256
from mmtensorar.model import adapters, attention, tensorar
from mmtensorar.model.loss import LossSettings
from mmtensorar.model.tensorar import TensorAR
from mmtensorar.recipe import Recipe

FORMAT = 1
INDEX = "checkpoint.json"
CODEC = "tensorar.safetensors"
ADAPTERS, BASE = "adapters.safetensors", "base.json"


class Loaded(NamedTuple):
    """What a consolidated checkpoint holds. The model is in eval mode on the asked device.

    image_tokenizer: None in a converted release that came without.
    """

    model: TensorAR
    image_tokenizer: Any
    caption_encoder: Any
    recipe: Recipe


def build(recipe: Recipe, *, weights: bool = True, device: str = "cpu") -> TensorAR:
    """The recipe's model in float32: backbone (with its weights unless told) and a fresh codec, drawn under run.seed."""
    backbone = backbones.load(recipe.backbone, weights=weights, device=device)
    return _around(recipe, backbone).to(device).float()


def _around(recipe: Recipe, backbone: backbones.Backbone) -> TensorAR:
    # Whatever was drawn before, so that the codec is the same one however its backbone came to be.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.run.seed)
        return tensorar.build(backbone, recipe.tensorar, loss=LossSettings.of(recipe.train))


def skeleton(recipe: Recipe) -> TensorAR:
    """The model that a recipe trains, with adapters and what is frozen, without values: parameters on the meta device."""
    with without_values():
        model = _around(recipe, backbones.load(recipe.backbone, weights=False))
    adapters.prepare(model, recipe.train, recipe.lora, seed=recipe.run.seed)
    return model


def starting(recipe: Recipe) -> Recipe:
    """The recipe with backbone.path where its run's weights come from: train.init_from's backbone, when that is set.

    So what the recipe says of its backbone is checked against the weights themselves, and the original need not be
    here any more. Raises ValueError when the folder is no checkpoint or holds another kind of backbone.
    """
    if recipe.train.init_from is None:
        return recipe
    read_index(recipe.train.init_from)
    if (Path(recipe.train.init_from) / ADAPTERS).is_file():
        raise ValueError(
            f"train.init_from: {recipe.train.init_from} holds adapters; fold them in first: "
            "python -m mmtensorar.merge SOURCE TARGET"
        )
    source = saved_recipe(recipe.train.init_from).backbone
    if source.name != recipe.backbone.name:
        raise ValueError(
            f"train.init_from: {recipe.train.init_from} holds a {source.name} backbone, the recipe asks for {recipe.backbone.name}"
        )
    return recipe.model_copy(update={"backbone": recipe.backbone.model_copy(update={"path": source.path})})


def initial_model(recipe: Recipe) -> TensorAR:
    """The model a run starts from, on the CPU in float32.

    With train.init_from the backbone comes from that consolidated folder, and the codec too when its
    tensors have the names and shapes of this recipe's; otherwise the codec is fresh. Its fresh values
    are drawn under run.seed. Raises ValueError when the folder does not fit the recipe.
    """
    if recipe.train.init_from is not None:
        check_files(Path(recipe.train.init_from))
    model = build(starting(recipe))
    _take_codec(model, recipe)
    return model


def initial_values(recipe: Recipe) -> Callable[[str], Tensor]:
    """A function from the name of a tensor of `skeleton` to its value in the model a run starts from, to be asked for once.

    Only the codec is in memory before, the backbone's are read from the files then. Raises ValueError like `initial_model`.
    """
    if recipe.train.init_from is not None:
        check_files(Path(recipe.train.init_from))
    unread = backbones.unread(starting(recipe).backbone)
    unread.check()
    model = _around(recipe, unread.model)
    _take_codec(model, recipe)
    codec = codec_state(model.state_dict())
    with_adapters = recipe.train.parts in adapters.WITH_ADAPTERS
    shapes = (
        {name: p.shape for name, p in skeleton(recipe).named_parameters() if ".lora_" in name}
        if with_adapters
        else {}
    )

    def value(name: str) -> Tensor:
        if name in codec:
            return codec.pop(name)
        if name in shapes:
            return adapters.initial(name, shapes[name], recipe.run.seed)
        return unread.value(name.removeprefix("backbone.").replace(".base_layer.", "."))

    return value


def _take_codec(model: TensorAR, recipe: Recipe) -> None:
    """Load the codec in train.init_from, where there is one and it fits."""
    if (
        recipe.train.init_from is None
        or model.window == 1
        or not (Path(recipe.train.init_from) / CODEC).is_file()
    ):
        return
    folder = Path(recipe.train.init_from)
    codec, own = load_file(folder / CODEC), codec_state(model.state_dict())
    same_heads = saved_recipe(folder).tensorar.num_heads == recipe.tensorar.num_heads  # which no shape shows
    if same_heads and {k: v.shape for k, v in codec.items()} == {k: v.shape for k, v in own.items()}:
        model.load_state_dict(codec, strict=False)
    elif os.environ.get("RANK", "0") == "0":  # without ZeRO-3 every rank comes here
        print(
            f"note: the codec in {folder} has another shape or number of heads than the recipe's, so a fresh one is trained"
        )


def model_to_train(recipe: Recipe) -> TensorAR:
    """The model a run starts from, with the adapters that it trains, and what it does not train frozen."""
    model = initial_model(recipe)
    adapters.prepare(model, recipe.train, recipe.lora, seed=recipe.run.seed)
    return model


def start_fingerprint(recipe: Recipe) -> str:
    """sha256 over the files that a run starts from, so that a run is not continued on other weights.

    Of each file its name, size, and first and last MiB count: enough to tell trainings apart, and quick at any size. A
    hub id stands for itself.
    """
    return _fingerprint(Path(recipe.train.init_from or recipe.backbone.path))


def _fingerprint(folder: Path) -> str:
    files = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
    digest = hashlib.sha256(b"" if files else str(folder).encode())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()


def codec_state(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a TensorAR state dict that belong to the window encoder and decoder."""
    return {name: value for name, value in state_dict.items() if name.startswith(adapters.CODEC_PARTS)}


def save_adapters(
    folder: str | Path, recipe: Recipe, state_dict: Mapping[str, Tensor], *, step: int = 0
) -> None:
    """Write a checkpoint of adapters and codec; the folder appears whole or not at all.

    state_dict: what was trained, with TensorAR's names. The backbone's own weights are not copied: base.json names them.
    """
    folder = Path(folder)
    with _replaced(folder) as partial:
        recipe.save(partial / "recipe.yaml")
        model = build(recipe, weights=False, device="meta")
        (partial / "backbone").mkdir()
        model.backbone.save_config(partial / "backbone")
        save_file(
            {name: value.contiguous() for name, value in adapters.state(state_dict).items()},
            partial / ADAPTERS,
        )
        if codec := codec_state(state_dict):
            save_file({name: value.contiguous() for name, value in codec.items()}, partial / CODEC)
        image_tokenizers.load(recipe.image_tokenizer).save_pretrained(partial / "image_tokenizer")
        path = recipe.backbone.path
        base = {
            "path": str(Path(path).resolve()) if Path(path).exists() else path,
            "fingerprint": _fingerprint(Path(path)),
        }
        (partial / BASE).write_text(json.dumps(base) + "\n", encoding="utf-8")
        write_index(partial, step)


def save(
    folder: str | Path,
    model: TensorAR | None,
    recipe: Recipe,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    step: int = 0,
) -> None:
    """Write a consolidated checkpoint; the folder appears whole or not at all.

    model: a complete model; None when its parameters are spread over ranks (ZeRO-3).
    state_dict: then the full CPU state dict with TensorAR's names, which a model built from
        the recipe's configuration receives. It wins when both are given.
    An existing checkpoint in folder is replaced. Raises ValueError when folder exists and is
    something else, since replacing it would delete it.
    """
    folder = Path(folder)
    _check_free(folder)
    if state_dict is not None:
        # On the meta device the model takes the given tensors over; a second copy in float32 would not fit beside 7B.
        model = build(recipe, weights=False, device="meta")
        _check_names(model.state_dict(), state_dict, "the gathered state dict")
        model.load_state_dict(dict(state_dict), strict=True, assign=True)
    assert model is not None, "save needs a model or a state dict"

    with _replaced(folder) as partial:
        recipe.save(partial / "recipe.yaml")
        model.backbone.save_pretrained(partial / "backbone")
        codec = codec_state(model.state_dict())
        if codec:
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in codec.items()}, partial / CODEC
            )
        image_tokenizers.load(recipe.image_tokenizer).save_pretrained(partial / "image_tokenizer")
        write_index(partial, step)


def _check_free(folder: Path) -> None:
    if folder.exists() and not (folder / INDEX).is_file() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and is not a checkpoint (no {INDEX}): choose another folder")


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A folder to write, which takes the place of a checkpoint at the end. Raises ValueError when something else is there."""
    _check_free(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except SafetensorError as error:  # the disk is full, say
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{folder}: cannot be written ({error})") from error
    # Renaming onto a folder that holds files fails, so the old one steps aside first and is
    # deleted only when the new one stands.
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def write_index(folder: Path, step: int, progress: Callable[[int], Any] = lambda size: None) -> None:
    """Write checkpoint.json over all files of a folder; progress: see `shards.sha256`."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {str(path.relative_to(folder)): sha256(path, progress) for path in paths}
    index = {"format": FORMAT, "step": step, "sha256": files}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_index(folder: str | Path) -> dict:
    """checkpoint.json of a folder. Raises ValueError when there is none or it is of another format."""
    path = Path(folder) / INDEX
    if not path.is_file():
        hint = ""
        if (Path(folder) / "model" / INDEX).is_file():
            hint = f"; the run's model is in {Path(folder) / 'model'}"
        elif (Path(folder) / "checkpoints").is_dir():
            hint = f"; of an unfinished run, python -m mmtensorar.export {folder} --out FOLDER makes a model of a checkpoint"
        raise ValueError(f"no checkpoint at {folder}: expected {INDEX}{hint}")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{path}: not JSON") from None
    found = index.get("format") if isinstance(index, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: checkpoint format {found!r}, expected {FORMAT}")
    if not isinstance(index.get("sha256"), dict) or not isinstance(index.get("step"), int):
        raise ValueError(f"{path}: expected a step and the sha256 of each file, the checkpoint is damaged")
    return index


def check_files(folder: str | Path) -> dict:
    """Compare every file with the sha256 in checkpoint.json; returns the index.

    Raises ValueError naming the first file that is missing or differs.
    """
    folder = Path(folder)
    index = read_index(folder)
    for name, expected in index["sha256"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"checkpoint {folder}: {name} is missing, {INDEX} lists it")
        if (found := sha256(path)) != expected:
            raise ValueError(
                f"checkpoint {folder}: {name} is damaged, its sha256 is {found}, expected {expected}"
            )
    return index


def saved_recipe(folder: str | Path, *, attn_implementation: attention.Implementation = "sdpa") -> Recipe:
    """The recipe in a checkpoint, its backbone and image tokenizer pointing into the folder.

    attn_implementation: instead of the recipe's, which was a matter of the machine that trained.
    """
    folder = Path(folder)
    recipe = Recipe.load(folder / "recipe.yaml", [])
    # A text tokenizer set apart in the recipe was copied into backbone/ with the weights.
    path = read_base(folder)["path"] if (folder / BASE).is_file() else str(folder / "backbone")
    backbone = {"path": path, "attn_implementation": attn_implementation}
    if hasattr(recipe.backbone, "text_tokenizer"):
        backbone["text_tokenizer"] = None
    return recipe.model_copy(
        update={
            "backbone": recipe.backbone.model_copy(update=backbone),
            "image_tokenizer": recipe.image_tokenizer.model_copy(
                update={"path": str(folder / "image_tokenizer")}
            ),
        }
    )


def read_base(folder: Path) -> dict[str, str]:
    """base.json of a checkpoint of adapters. Raises ValueError when it is damaged."""
    path = folder / BASE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if (
        not isinstance(found, dict)
        or set(found) != {"path", "fingerprint"}
        or not all(isinstance(v, str) for v in found.values())
    ):
        raise ValueError(
            f"{path}: expected the path and the fingerprint of the backbone, the checkpoint is damaged"
        )
    return found


def load(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    attn_implementation: attention.Implementation = "sdpa",
    verify: bool = True,
) -> Loaded:
    """Load a consolidated checkpoint for generation.

    dtype: of the model's weights; the image tokenizer stays float32. verify: compare sha256s
    first. Raises ValueError, naming the folder, for an absent, incomplete or damaged one.
    """
    folder = Path(folder)
    attention.require(attn_implementation, key="attn_implementation", dtype=dtype)
    index = check_files(folder) if verify else read_index(folder)
    recipe = saved_recipe(folder, attn_implementation=attn_implementation)
    if (folder / ADAPTERS).is_file() and _fingerprint(Path(recipe.backbone.path)) != read_base(folder)[
        "fingerprint"
    ]:
        raise ValueError(
            f"checkpoint {folder}: its adapters are for other weights than those in {recipe.backbone.path} now"
        )
    backbone = backbones.load(recipe.backbone, device="cpu")
    model = tensorar.build(backbone, recipe.tensorar, loss=LossSettings.of(recipe.train))
    if (folder / ADAPTERS).is_file():
        try:
            adapters.fold(model, recipe.train, recipe.lora, load_file(folder / ADAPTERS))
        except ValueError as error:
            raise ValueError(f"checkpoint {folder}: {error}") from error
    if codec_state(model.state_dict()):
        if not (folder / CODEC).is_file():
            raise ValueError(
                f"checkpoint {folder}: {CODEC} is missing, and its recipe has tensorar.window {model.window}"
            )
        found = load_file(folder / CODEC)
        _check_names(codec_state(model.state_dict()), found, f"checkpoint {folder}: {CODEC}")
        model.load_state_dict(found, strict=False)
    # Only parameters change dtype: rotary frequencies and the like are float32 buffers, and
    # rounding them to bfloat16 would move every position.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to(device).eval()
    image_tokenizer = None
    if any(name.startswith("image_tokenizer/") for name in index["sha256"]):
        image_tokenizer = image_tokenizers.load(recipe.image_tokenizer)
    if isinstance(image_tokenizer, torch.nn.Module):
        image_tokenizer.to(device)
    return Loaded(model, image_tokenizer, backbones.caption_encoder(recipe.backbone), recipe)


def _check_names(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        raise ValueError(f"{where}: missing {missing[:3] or 'nothing'}, unexpected {extra[:3] or 'nothing'}")
    for name, value in expected.items():
        if value.shape != found[name].shape:
            raise ValueError(
                f"{where}: {name} has shape {list(found[name].shape)}, expected {list(value.shape)}"
            )
