"""Model folders: what generation and evaluation load, without DeepSpeed.

FOLDER/
  recipe.yaml            the resolved recipe of the run
  backbone/              config.json, model.safetensors, text tokenizer files
  tensorar.safetensors   weights of the window encoder and decoder; absent at window 1
  adapters.safetensors   after training with adapters; backbone/ then has no weights
  base.json              with adapters: path and fingerprint of the backbone's weights
  image_tokenizer/       config.json, model.safetensors; absent if a conversion was given none
  source.json            of converted released weights: kind and SHA-256 of the files they came from
  checkpoint.json        format version, step, SHA-256 of each file; written last
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmtensorar import backbones, image_tokenizers
from mmtensorar.checkpoints.index import FORMAT, INDEX, read_index
from mmtensorar.checkpoints.released import meta_parameters
from mmtensorar.files import fingerprint, new_path, read_json, sha256
from mmtensorar.model import adapters, attention, tensorar
from mmtensorar.model.loss import LossSettings
from mmtensorar.model.tensorar import TensorAR
from mmtensorar.ranks import is_first
from mmtensorar.recipe import Recipe

CODEC = "tensorar.safetensors"
ADAPTERS, BASE = "adapters.safetensors", "base.json"


class Loaded(NamedTuple):
    """What a model folder holds.

    The model is in eval mode on the device that was asked for.

    image_tokenizer: None if the released weights were converted without one.
    """

    model: TensorAR
    image_tokenizer: Any
    caption_encoder: Any
    recipe: Recipe


# ---- the model of a recipe -----------------------------------------------------------------------


def build(recipe: Recipe, *, weights: bool = True, device: str = "cpu") -> TensorAR:
    """The recipe's model in float32: its backbone, and a fresh codec drawn under
    run.seed.

    weights, device: see `backbones.load`.
    """
    backbone = backbones.load(recipe.backbone, weights=weights, device=device)
    return _around(recipe, backbone).to(device).float()


def _around(recipe: Recipe, backbone: backbones.Backbone) -> TensorAR:
    # Seeded here, so that the codec does not depend on how the backbone was made.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.run.seed)
        return tensorar.build(backbone, recipe.tensorar, loss=LossSettings.of(recipe.train))


def skeleton(recipe: Recipe) -> TensorAR:
    """The model that a recipe trains, with adapters and frozen parts, its parameters on
    the meta device.
    """
    with meta_parameters():
        model = _around(recipe, backbones.load(recipe.backbone, weights=False))
    adapters.prepare(model, recipe.train, recipe.lora, seed=recipe.run.seed)
    return model


def starting(recipe: Recipe) -> Recipe:
    """The recipe with backbone.path pointing to the weights that its run starts
    from.

    With train.init_from that is the backbone of the model folder. So the recipe's
    backbone settings are checked against these weights, and the original backbone is
    not needed any more. Raises ValueError when train.init_from is not a model folder,
    or holds another kind of backbone.
    """
    if recipe.train.init_from is None:
        return recipe
    read_index(recipe.train.init_from)
    if (Path(recipe.train.init_from) / ADAPTERS).is_file():
        raise ValueError(
            f"train.init_from: {recipe.train.init_from} holds adapters; fold them in first: "
            "mmtensorar merge SOURCE TARGET"
        )
    saved, section = saved_recipe(recipe.train.init_from).backbone, recipe.backbone
    if saved.name != section.name:
        raise ValueError(
            f"train.init_from: {recipe.train.init_from} holds a {saved.name} backbone, "
            f"the recipe asks for {section.name}"
        )
    return recipe.model_copy(update={"backbone": section.model_copy(update={"path": saved.path})})


def initial_model(recipe: Recipe) -> TensorAR:
    """The model a run starts from, on the CPU in float32.

    With train.init_from the backbone comes from that model folder, and so does the
    codec if its tensors have the names and shapes of this recipe's. Otherwise the codec
    is fresh, drawn under run.seed. Raises ValueError when the folder does not fit the
    recipe.
    """
    if recipe.train.init_from is not None:
        check_files(Path(recipe.train.init_from))
    model = build(starting(recipe))
    _take_codec(model, recipe)
    return model


def initial_values(recipe: Recipe) -> Callable[[str], Tensor]:
    """A function from the name of a tensor of `skeleton` to its value at the start of a
    run.

    Call it once for each name. Only the codec is in memory; the backbone's tensors are
    read from the files when they are asked for. Raises ValueError like `initial_model`.
    """
    if recipe.train.init_from is not None:
        check_files(Path(recipe.train.init_from))
    weights = backbones.lazy_weights(starting(recipe).backbone)
    weights.check()
    model = _around(recipe, weights.model)
    _take_codec(model, recipe)
    codec = codec_state(model.state_dict())
    with_adapters = recipe.train.parts in adapters.WITH_ADAPTERS
    shapes = {}
    if with_adapters:
        shapes = {name: p.shape for name, p in skeleton(recipe).named_parameters() if ".lora_" in name}

    def value(name: str) -> Tensor:
        if name in codec:
            return codec.pop(name)
        if name in shapes:
            return adapters.initial(name, shapes[name], recipe.run.seed)
        return weights.value(name.removeprefix("backbone.").replace(".base_layer.", "."))

    return value


def _take_codec(model: TensorAR, recipe: Recipe) -> None:
    """Load the codec from train.init_from into model, if there is one and it fits."""
    if (
        recipe.train.init_from is None
        or model.window == 1
        or not (Path(recipe.train.init_from) / CODEC).is_file()
    ):
        return
    folder = Path(recipe.train.init_from)
    codec, fresh = load_file(folder / CODEC), codec_state(model.state_dict())
    # The number of heads changes no shape.
    same_heads = saved_recipe(folder).tensorar.num_heads == recipe.tensorar.num_heads
    if same_heads and {k: v.shape for k, v in codec.items()} == {k: v.shape for k, v in fresh.items()}:
        model.load_state_dict(codec, strict=False)
    elif is_first():  # without ZeRO-3 every rank runs this
        print(
            f"note: the codec in {folder} has another shape or number of heads than the recipe's, "
            "so a fresh one is trained"
        )


def model_to_train(recipe: Recipe) -> TensorAR:
    """The model a run starts from, with adapters inserted, and frozen parts frozen."""
    model = initial_model(recipe)
    adapters.prepare(model, recipe.train, recipe.lora, seed=recipe.run.seed)
    return model


def start_fingerprint(recipe: Recipe) -> str:
    """`files.fingerprint` of the weights that a run starts from.

    A run resumes only on the same weights.
    """
    return fingerprint(Path(recipe.train.init_from or recipe.backbone.path))


def codec_state(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a TensorAR state dict that belong to the window encoder and
    decoder.
    """
    return {name: value for name, value in state_dict.items() if name.startswith(adapters.CODEC_PARTS)}


# ---- writing -------------------------------------------------------------------------------------


def save(folder: str | Path, model: TensorAR, recipe: Recipe, *, step: int = 0) -> None:
    """Write the model folder of a model whose parameters are all in this process.

    The folder appears when it is complete, and replaces a model folder of the same
    name. Raises ValueError when folder exists and is something else, since replacing it
    would delete it.
    """
    with _model_folder(Path(folder)) as partial:
        recipe.save(partial / "recipe.yaml")
        model.backbone.save_pretrained(partial / "backbone")
        _save_tensors(codec_state(model.state_dict()), partial / CODEC)
        image_tokenizers.load(recipe.image_tokenizer).save_pretrained(partial / "image_tokenizer")
        write_index(partial, step)


def save_state_dict(
    folder: str | Path, state_dict: Mapping[str, Tensor], recipe: Recipe, *, step: int = 0
) -> None:
    """Write the model folder of a state dict, for parameters that are spread over ranks
    (ZeRO-3).

    state_dict: all tensors on the CPU, with TensorAR's names. Raises ValueError like
    `save`, and when names or shapes are not those of the recipe's model.
    """
    _check_free(Path(folder))
    # The model is built only because it can write its tensors under the released names.
    # On the meta device it adopts the given tensors; with 7B a second copy in float32
    # would not fit into memory.
    model = build(recipe, weights=False, device="meta")
    _check_names(model.state_dict(), state_dict, "the gathered state dict")
    model.load_state_dict(dict(state_dict), strict=True, assign=True)
    save(folder, model, recipe, step=step)


def save_adapters(
    folder: str | Path, recipe: Recipe, state_dict: Mapping[str, Tensor], *, step: int = 0
) -> None:
    """Write a model folder of adapters and codec. It appears when it is complete.

    state_dict: what was trained, with TensorAR's names. The backbone's weights are not
    copied; base.json names them.
    """
    with _model_folder(Path(folder)) as partial:
        recipe.save(partial / "recipe.yaml")
        model = build(recipe, weights=False, device="meta")
        (partial / "backbone").mkdir()
        model.backbone.save_config(partial / "backbone")
        _save_tensors(adapters.state(dict(state_dict)), partial / ADAPTERS)
        _save_tensors(codec_state(state_dict), partial / CODEC)
        image_tokenizers.load(recipe.image_tokenizer).save_pretrained(partial / "image_tokenizer")
        path = recipe.backbone.path
        base = {
            "path": str(Path(path).resolve()) if Path(path).exists() else path,
            "fingerprint": fingerprint(Path(path)),
        }
        (partial / BASE).write_text(json.dumps(base) + "\n", encoding="utf-8")
        write_index(partial, step)


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file, unless there are no tensors."""
    if tensors:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)


def _check_free(folder: Path) -> None:
    if folder.exists() and not (folder / INDEX).is_file() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and is not a model folder (no {INDEX}); choose another folder")


@contextmanager
def _model_folder(folder: Path) -> Iterator[Path]:
    """A folder to write, which replaces a model folder at the end.

    Raises ValueError when the path exists and is something else.
    """
    _check_free(folder)
    try:
        with new_path(folder, replace=True) as partial:
            partial.mkdir()
            yield partial
    except SafetensorError as error:  # for example when the disk is full
        raise OSError(f"{folder}: cannot be written ({error})") from error


def write_index(folder: Path, step: int, progress: Callable[[int], Any] = lambda size: None) -> None:
    """Write checkpoint.json over all files of a folder.

    progress: see `files.sha256`.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {str(path.relative_to(folder)): sha256(path, progress) for path in paths}
    index = {"format": FORMAT, "step": step, "sha256": files}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


# ---- reading -------------------------------------------------------------------------------------


def check_files(folder: str | Path) -> dict:
    """Compare every file with the SHA-256 in checkpoint.json; returns the index.

    Raises ValueError naming the first file that is missing or differs.
    """
    folder = Path(folder)
    index = read_index(folder)
    for name, expected in index["sha256"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"model folder {folder}: {name} is missing, {INDEX} lists it")
        if (digest := sha256(path)) != expected:
            raise ValueError(
                f"model folder {folder}: {name} is damaged, its sha256 is {digest}, expected {expected}"
            )
    return index


def saved_recipe(folder: str | Path, *, attn_implementation: attention.Implementation = "sdpa") -> Recipe:
    """The recipe in a model folder, its backbone and image tokenizer pointing into the
    folder.

    attn_implementation: replaces the recipe's, which was chosen for training.
    """
    folder = Path(folder)
    recipe = Recipe.load(folder / "recipe.yaml", [])
    path = read_base(folder)["path"] if (folder / BASE).is_file() else str(folder / "backbone")
    backbone = recipe.backbone.at(path).model_copy(update={"attn_implementation": attn_implementation})
    return recipe.model_copy(
        update={
            "backbone": backbone,
            "image_tokenizer": recipe.image_tokenizer.model_copy(
                update={"path": str(folder / "image_tokenizer")}
            ),
        }
    )


def recorded_backbone_path(folder: Path) -> str:
    """backbone.path in the saved recipe: the weights that training started from."""
    return Recipe.load(folder / "recipe.yaml").backbone.path


def read_base(folder: Path) -> dict[str, str]:
    """base.json of a model folder of adapters. Raises ValueError when it is damaged."""
    path = folder / BASE
    base = read_json(path)
    if set(base) != {"path", "fingerprint"} or not all(isinstance(value, str) for value in base.values()):
        raise ValueError(
            f"{path}: expected the path and the fingerprint of the backbone; the folder is damaged"
        )
    return base


def load(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    attn_implementation: attention.Implementation = "sdpa",
) -> Loaded:
    """Load a model folder for generation.

    Its files are compared with their SHA-256 first.

    Args:
        folder: the model folder.
        device: for the model and the image tokenizer.
        dtype: of the model's parameters; the image tokenizer stays in float32.
        attn_implementation: see mmtensorar.model.attention.

    Raises ValueError, naming the folder, when it is missing, incomplete or damaged.
    """
    folder = Path(folder)
    attention.require(attn_implementation, key="attn_implementation", dtype=dtype)
    index = check_files(folder)
    recipe = saved_recipe(folder, attn_implementation=attn_implementation)
    model = _load_model(folder, recipe)
    # Only parameters change dtype. Buffers such as rotary frequencies stay in float32,
    # since rounding them to bfloat16 would move every position.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to(device).eval()
    image_tokenizer = None
    if any(name.startswith("image_tokenizer/") for name in index["sha256"]):
        image_tokenizer = image_tokenizers.load(recipe.image_tokenizer)
        image_tokenizer.to(device)
    return Loaded(model, image_tokenizer, backbones.caption_encoder(recipe.backbone), recipe)


def _load_model(folder: Path, recipe: Recipe) -> TensorAR:
    """The model of a folder in float32 on the CPU, adapters folded in.

    recipe: see `saved_recipe`.
    """
    has_adapters = (folder / ADAPTERS).is_file()
    if has_adapters and fingerprint(Path(recipe.backbone.path)) != read_base(folder)["fingerprint"]:
        raise ValueError(
            f"model folder {folder}: its adapters were trained on other weights than those now in "
            f"{recipe.backbone.path}"
        )
    backbone = backbones.load(recipe.backbone, device="cpu")
    model = tensorar.build(backbone, recipe.tensorar, loss=LossSettings.of(recipe.train))
    if has_adapters:
        try:
            adapters.fold(model, recipe.train, recipe.lora, load_file(folder / ADAPTERS))
        except ValueError as error:
            raise ValueError(f"model folder {folder}: {error}") from error
    if expected := codec_state(model.state_dict()):
        if not (folder / CODEC).is_file():
            raise ValueError(
                f"model folder {folder}: {CODEC} is missing, and its recipe has "
                f"tensorar.window {model.window}"
            )
        codec = load_file(folder / CODEC)
        _check_names(expected, codec, f"model folder {folder}: {CODEC}")
        model.load_state_dict(codec, strict=False)
    return model


def _check_names(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError unless names and shapes are equal."""
    missing, extra = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing or extra:
        raise ValueError(f"{where}: missing {missing[:3] or 'nothing'}, unexpected {extra[:3] or 'nothing'}")
    for name, value in expected.items():
        if value.shape != given[name].shape:
            raise ValueError(
                f"{where}: {name} has shape {list(given[name].shape)}, expected {list(value.shape)}"
            )
