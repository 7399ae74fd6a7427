"""The training state in pieces: what each rank holds of weights and moments, in files that any number of ranks can read.

    STEP_FOLDER/
      rank_00000.safetensors   the rank's flat tensors: FLAT/KEY, KEY being master, exp_avg, ...
      rank_00000.json          which stretches of which parameters they are, and the file's sha256
      state.json               the step, the number of ranks and what else the run counts; written when all of these are there

A rank's optimiser works on flat tensors, each made of stretches of several parameters. How they are cut depends on the number
of ranks and on the ZeRO stage; the files say how it was, so that ranks which are cut otherwise find their own stretches.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmtensorar.files import sha256

FORMAT = 1
STATE = "state.json"


class Piece(NamedTuple):
    """A stretch of a parameter, row-major, and where it is: number values from flat_start on in flat tensor number flat."""

    name: str
    start: int
    flat: int
    flat_start: int
    number: int


State = list[dict[str, Any]]
"""For each flat tensor of a rank, key -> value. A tensor of the flat tensor's shape has a number for each number of it."""


def copied(state: State) -> State:
    """The state as it is now, on the CPU, for writing while training goes on."""
    return [
        {
            key: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
            for key, value in values.items()
        }
        for values in state
    ]


def write(
    folder: Path, rank: int, pieces: Sequence[Piece], shapes: Sequence[torch.Size], state: State
) -> None:
    """One rank's two files. shapes: of the flat tensors."""
    tensors, numbers, seen = {}, {}, set()
    for flat, values in enumerate(state):
        for key, value in values.items():
            if not isinstance(value, Tensor):
                numbers[f"{flat}/{key}"] = value
                continue
            value = value.detach().cpu().contiguous()
            # Flat in the file too, since a stretch is read by its place. Some tensors (bitsandbytes' tables) are in all places
            # the same one, which safetensors does not write.
            value = value.clone() if value.data_ptr() in seen else value
            seen.add(value.data_ptr())
            tensors[f"{flat}/{key}"] = value.flatten() if value.shape == shapes[flat] else value
    path = folder / _name(rank)
    save_file(tensors, path)
    layout = {
        "pieces": [list(piece) for piece in pieces],
        "sizes": [shape.numel() for shape in shapes],
        "numbers": numbers,
        "sha256": sha256(path),
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(layout) + "\n", encoding="utf-8")
    os.replace(partial, path.with_suffix(".json"))


def missing(folder: Path, num_ranks: int) -> list[int]:
    """The ranks whose files are not all there yet."""
    return [rank for rank in range(num_ranks) if not (folder / _name(rank)).with_suffix(".json").is_file()]


def digests(folder: Path, num_ranks: int) -> dict[str, str]:
    """File -> sha256: of tensors as each rank noted it, of the notes as they are. Raises ValueError when one is damaged."""
    found = {}
    for rank in range(num_ranks):
        found[_name(rank)] = _layout(folder, rank)["sha256"]
        note = (folder / _name(rank)).with_suffix(".json")
        found[note.name] = sha256(note)
    return found


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name; -1 when it is no name of one."""
    number = folder.name.rpartition("_")[2]
    return int(number) if number.isdigit() else -1


def read(
    folder: Path,
    rank: int,
    num_ranks: int,
    saved_ranks: int,
    pieces: Sequence[Piece],
    shapes: Sequence[torch.Size],
    *,
    only: str | None = None,
    flats: Collection[int] | None = None,
) -> State:
    """A rank's state, from files of saved_ranks ranks. Tensors are on the CPU, those of a flat tensor's size in its shape.

    only: a key, when the others are not wanted; flats: flat tensors, when the others are not. Raises ValueError when the files are
    damaged, do not hold all of a stretch, or hold moments in 8 bits, which are scaled in blocks of a flat tensor, and the ranks were
    cut otherwise.
    """
    flats = range(len(shapes)) if flats is None else flats
    layouts = [_layout(folder, saved) for saved in range(saved_ranks)]
    sizes = [shape.numel() for shape in shapes]
    own = {"pieces": [list(piece) for piece in pieces], "sizes": sizes}
    # Without ZeRO one file serves all ranks.
    alike = rank if saved_ranks == num_ranks else 0
    if saved_ranks in (1, num_ranks) and all(layouts[alike][key] == value for key, value in own.items()):
        state: State = [{} for _ in sizes]
        with _opened(folder / _name(alike)) as file:
            for name in file.keys():
                flat, key = name.split("/", 1)
                if only in (None, key) and int(flat) in flats:
                    # A copy: what stays a view of the file keeps it from being deleted.
                    state[int(flat)][key] = file.get_tensor(name).clone()
        for name, value in layouts[alike]["numbers"].items():
            flat, key = name.split("/", 1)
            if only in (None, key) and int(flat) in flats:
                state[int(flat)][key] = value
    else:
        wanted = [piece for piece in pieces if piece.flat in flats]
        state = _recut(
            folder, layouts, wanted, [size if flat in flats else 0 for flat, size in enumerate(sizes)], only
        )
    for values, shape in zip(state, shapes, strict=True):
        for key, value in values.items():
            if isinstance(value, Tensor) and value.ndim and value.numel() == shape.numel():
                values[key] = value.reshape(shape)
    return state


def _recut(
    folder: Path, layouts: list[dict], pieces: Sequence[Piece], sizes: list[int], only: str | None
) -> State:
    places: dict[str, list[tuple[int, Piece]]] = {}
    for saved, layout in enumerate(layouts):
        for piece in map(Piece._make, layout["pieces"]):
            places.setdefault(piece.name, []).append((saved, piece))
    state: State = [{} for _ in sizes]
    opened = [_opened(folder / _name(saved)) for saved in range(len(layouts))]
    try:
        for piece in pieces:
            filled = 0
            for saved, there in places.get(piece.name, []):
                first, stop = (
                    max(piece.start, there.start),
                    min(piece.start + piece.number, there.start + there.number),
                )
                if first >= stop or filled == piece.number:
                    continue
                filled += stop - first
                values = _stretch(
                    opened[saved],
                    layouts[saved],
                    there,
                    first - there.start,
                    stop - first,
                    folder / _name(saved),
                    only,
                )
                place = piece.flat_start + first - piece.start
                for key, value in values.items():
                    if not isinstance(value, Tensor) or not value.ndim:
                        state[piece.flat][key] = value
                        continue
                    if key not in state[piece.flat]:
                        state[piece.flat][key] = value.new_zeros(sizes[piece.flat])
                    state[piece.flat][key][place : place + stop - first] = value
            if filled != piece.number:
                raise ValueError(f"{folder}: it holds {filled} of {piece.number} numbers of {piece.name}")
    finally:
        for file in opened:
            file.__exit__(None, None, None)
    # A flat tensor may be all padding: it counts steps all the same.
    known = _kinds_of_values(folder / _name(0), layouts[0], only) | {
        key: value for values in state for key, value in values.items()
    }
    for key, value in known.items():
        for values, size in zip(state, sizes, strict=True):
            single = not isinstance(value, Tensor) or not value.ndim
            values.setdefault(key, value if single else value.new_zeros(size))
    return state


def _kinds_of_values(path: Path, layout: dict, only: str | None) -> dict[str, Any]:
    """Key -> a value of its kind, of what a file holds: tensors as large as a flat one are empty here."""
    found = {name.partition("/")[2]: value for name, value in layout["numbers"].items()}
    with _opened(path) as file:
        for name in file.keys():
            key, value = name.partition("/")[2], file.get_slice(name)
            if not value.get_shape():
                found[key] = file.get_tensor(name).clone()
            elif value.get_dtype() in ("F32", "F16", "BF16") and key not in found:
                found[key] = value[:0]
    return {key: value for key, value in found.items() if only in (None, key)}


def _stretch(
    file, layout: dict, piece: Piece, skip: int, number: int, path: Path, only: str | None
) -> dict[str, Any]:
    """What a file holds for a part of one of its pieces: key -> the part, or a value that is of the whole flat tensor."""
    prefix, size, found = f"{piece.flat}/", layout["sizes"][piece.flat], {}
    for name in file.keys():
        if not name.startswith(prefix) or only not in (None, name.removeprefix(prefix)):
            continue
        value = file.get_slice(name)
        shape, key = value.get_shape(), name.removeprefix(prefix)
        if not shape:
            found[key] = file.get_tensor(name).clone()
        elif shape == [size] and value.get_dtype() in ("F32", "F16", "BF16"):
            found[key] = value[piece.flat_start + skip : piece.flat_start + skip + number]
        else:
            raise ValueError(
                f"{path}: {key} is scaled in blocks of a rank's piece, so it needs as many ranks as wrote it and the same "
                "zero.stage (or start anew from a model with train.init_from)"
            )
    for name, value in layout["numbers"].items():
        if name.startswith(prefix) and only in (None, name.removeprefix(prefix)):
            found[name.removeprefix(prefix)] = value
    return found


def latest(folder: Path) -> dict:
    """What was recorded with the checkpoint that the file `latest` in folder names, or without that file with the newest.

    Raises ValueError when it is not whole.
    """
    if not (folder / "latest").is_file():
        # Lost in a copy, say, or never written because the run was killed just then: what is whole is whole.
        return recorded(max((path.parent for path in folder.glob(f"step_*/{STATE}")), key=step_of))
    name = (folder / "latest").read_text(encoding="utf-8").strip()
    if not (folder / name / STATE).is_file():
        raise ValueError(
            f"{folder / 'latest'} names {name!r}, but {folder / name / STATE} is missing: {way_out(folder, name)}"
        )
    return recorded(folder / name)


def recorded(folder: Path) -> dict:
    """state.json of a checkpoint. Raises ValueError when it is damaged."""
    path = folder / STATE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    kinds: Mapping[str, type] = {"step": int, "num_files": int, "sha256": dict}
    if isinstance(found, dict) and found.get("format") != FORMAT:
        raise ValueError(
            f"{path}: checkpoint format {found.get('format')!r}, expected {FORMAT}; start anew with train.init_from"
        )
    if not isinstance(found, dict) or any(
        not isinstance(found.get(key), kind) for key, kind in kinds.items()
    ):
        raise ValueError(
            f"{path}: expected JSON with {', '.join(kinds)}, it is damaged: {way_out(folder.parent, folder.name)}"
        )
    return found


def way_out(folder: Path, name: str) -> str:
    """What to do when the checkpoint called name is not whole, in words."""
    older = sorted(
        (path.parent for path in folder.glob(f"step_*/{STATE}") if path.parent.name != name), key=step_of
    )
    if older:
        return f"write {older[-1].name} into {folder / 'latest'} to go on from there"
    return "no other one is left; delete the folder of the run, or start another run.name"


def _name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _opened(path: Path):
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # safetensors has errors of its own
        raise ValueError(f"{path}: cannot be read ({error})") from None


def _layout(folder: Path, rank: int) -> dict:
    path = (folder / _name(rank)).with_suffix(".json")
    try:
        layout = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"{path} is missing or damaged") from None
    kinds: Mapping[str, type] = {"pieces": list, "sizes": list, "numbers": dict, "sha256": str}
    if not isinstance(layout, dict) or any(
        not isinstance(layout.get(key), kind) for key, kind in kinds.items()
    ):
        raise ValueError(f"{path}: expected {', '.join(kinds)}")
    whole = all(
        len(piece) == 5 and list(map(type, piece)) == [str, int, int, int, int] for piece in layout["pieces"]
    )
    if not whole or any(piece[2] >= len(layout["sizes"]) for piece in layout["pieces"]):
        raise ValueError(f"{path}: expected pieces of name, start, flat, flat_start and number")
    return layout
