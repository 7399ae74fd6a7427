"""The run state on disk: what each rank holds of weights and moments, readable by any
number of ranks.

    STEP_FOLDER/
      rank_00000.safetensors   the rank's flat tensors: FLAT/KEY, where KEY is master, exp_avg, ...
      rank_00000.json          which parts of which parameters they hold, and the file's SHA-256
      state.json               the step, the number of ranks and other counters of the run; written last

A rank's optimizer works on flat tensors. Each is a concatenation of pieces: parts of
several parameters. Where parameters are cut depends on the number of ranks and on the
ZeRO stage. The files record the pieces, so that a run with other cuts finds its values.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmtensorar.files import read_json, read_text, sha256, write_text

FORMAT = 1
STATE = "state.json"
LAYOUT: Mapping[str, type] = {"pieces": list, "sizes": list, "numbers": dict, "sha256": str}  # of rank_*.json
SLICED = ("F32", "F16", "BF16")  # dtypes of values that can be cut anywhere; 8-bit moments are in blocks


class Piece(NamedTuple):
    """A part of a parameter, row-major, and where a rank holds it."""

    name: str  # of the parameter
    start: int  # first value in the parameter
    flat: int  # number of the flat tensor
    flat_start: int  # first value in the flat tensor
    number: int  # of values


# For each flat tensor of a rank, key -> value. A value of the flat tensor's shape has
# one number per weight. Other values (a step count, a table) belong to the flat tensor
# as a whole.
State = list[dict[str, Any]]


# ---- writing -------------------------------------------------------------------------------------


def copied(state: State) -> State:
    """A copy of the state on the CPU, to write while training continues."""
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
    """Write one rank's two files. shapes: of the flat tensors."""
    tensors, numbers, seen = {}, {}, set()
    for flat, values in enumerate(state):
        for key, value in values.items():
            if not isinstance(value, Tensor):
                numbers[f"{flat}/{key}"] = value
                continue
            value = value.detach().cpu().contiguous()
            # Flat in the file too, so that a piece can be read by its position. Some
            # values (bitsandbytes' tables) are one tensor under several keys, which
            # safetensors refuses to write.
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
    write_text(path.with_suffix(".json"), json.dumps(layout) + "\n")


def missing(folder: Path, num_ranks: int) -> list[int]:
    """The ranks whose files are not complete yet."""
    return [rank for rank in range(num_ranks) if not (folder / _name(rank)).with_suffix(".json").is_file()]


def digests(folder: Path, num_ranks: int) -> dict[str, str]:
    """File name -> SHA-256.

    For files of tensors it is the one that their rank recorded.

    Raises ValueError when a rank's record is damaged.
    """
    digests = {}
    for rank in range(num_ranks):
        digests[_name(rank)] = _layout(folder, rank)["sha256"]
        record = (folder / _name(rank)).with_suffix(".json")
        digests[record.name] = sha256(record)
    return digests


def step_of(folder: Path) -> int:
    """The step in a folder's name, step_NUMBER; -1 for another name."""
    number = folder.name.rpartition("_")[2]
    return int(number) if number.isdigit() else -1


# ---- reading -------------------------------------------------------------------------------------


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
    """A rank's state, from the files of saved_ranks ranks. Tensors are on the CPU.

    Args:
        folder: of one step.
        rank, num_ranks: which of the ranks that read this is.
        saved_ranks: how many ranks wrote the files.
        pieces: of the reading rank.
        shapes: of its flat tensors; a value of a flat tensor's size gets its shape.
        only: a key, to read no others.
        flats: numbers of flat tensors, to read no others.

    Raises ValueError when the files are damaged, do not hold all values of a piece, or
    hold 8-bit moments (which are scaled in blocks of a flat tensor) and the ranks were
    cut differently.
    """
    flats = range(len(shapes)) if flats is None else flats
    layouts = [_layout(folder, saved) for saved in range(saved_ranks)]
    sizes = [shape.numel() for shape in shapes]
    # Without ZeRO one file serves all ranks.
    same = rank if saved_ranks == num_ranks else 0
    layout = layouts[same] if saved_ranks in (1, num_ranks) else {}
    if layout.get("pieces") == [list(piece) for piece in pieces] and layout.get("sizes") == sizes:
        state = _read_unchanged(folder / _name(same), layout, flats, only)
    else:
        wanted = [piece for piece in pieces if piece.flat in flats]
        sizes = [size if flat in flats else 0 for flat, size in enumerate(sizes)]
        state = _read_recut(folder, layouts, wanted, sizes, only)
    for values, shape in zip(state, shapes, strict=True):
        for key, value in values.items():
            if isinstance(value, Tensor) and value.ndim and value.numel() == shape.numel():
                values[key] = value.reshape(shape)
    return state


def _read_unchanged(path: Path, layout: dict, flats: Collection[int], only: str | None) -> State:
    """The state in one rank's files, whose pieces are those of the reading rank."""
    state: State = [{} for _ in layout["sizes"]]
    with _opened(path) as file:
        for name in file.keys():
            flat, key = name.split("/", 1)
            if only in (None, key) and int(flat) in flats:
                # A copy: a view of the file would keep it from being deleted.
                state[int(flat)][key] = file.get_tensor(name).clone()
    for name, value in layout["numbers"].items():
        flat, key = name.split("/", 1)
        if only in (None, key) and int(flat) in flats:
            state[int(flat)][key] = value
    return state


def _read_recut(
    folder: Path, layouts: list[dict], pieces: Sequence[Piece], sizes: list[int], only: str | None
) -> State:
    """The values of these pieces, put together from the pieces in all ranks' files."""
    saved_pieces: dict[str, list[tuple[int, Piece]]] = {}
    for saved_rank, layout in enumerate(layouts):
        for piece in map(Piece._make, layout["pieces"]):
            saved_pieces.setdefault(piece.name, []).append((saved_rank, piece))
    state: State = [{} for _ in sizes]
    with ExitStack() as stack:
        paths = [folder / _name(saved_rank) for saved_rank in range(len(layouts))]
        files = [stack.enter_context(_opened(path)) for path in paths]
        for piece in pieces:
            num_filled = 0
            for saved_rank, first, saved, stop in _overlaps(piece, saved_pieces.get(piece.name, [])):
                if num_filled == piece.number:
                    break
                num_filled += stop - first
                skip, number = first - saved.start, stop - first
                values = _part(
                    files[saved_rank], layouts[saved_rank], saved, skip, number, paths[saved_rank], only
                )
                at = piece.flat_start + first - piece.start
                _put(state[piece.flat], values, at, number, sizes[piece.flat])
            if num_filled != piece.number:
                raise ValueError(f"{folder}: it holds {num_filled} of {piece.number} numbers of {piece.name}")
    # A flat tensor of padding only has no piece, but needs the same keys.
    known = _values_by_key(folder / _name(0), layouts[0], only)
    known |= {key: value for values in state for key, value in values.items()}
    for key, value in known.items():
        single = not isinstance(value, Tensor) or not value.ndim
        for values, size in zip(state, sizes, strict=True):
            values.setdefault(key, value if single else value.new_zeros(size))
    return state


def _overlaps(
    piece: Piece, saved_pieces: Sequence[tuple[int, Piece]]
) -> Iterator[tuple[int, int, Piece, int]]:
    """(rank, first, its piece, stop): the values first to stop of the parameter are in
    both pieces.
    """
    for saved_rank, saved in saved_pieces:
        first = max(piece.start, saved.start)
        stop = min(piece.start + piece.number, saved.start + saved.number)
        if first < stop:
            yield saved_rank, first, saved, stop


def _put(flat_values: dict[str, Any], values: dict[str, Any], at: int, number: int, size: int) -> None:
    """Add the values of a part to those of a flat tensor of this size, from position
    `at` on.
    """
    for key, value in values.items():
        if not isinstance(value, Tensor) or not value.ndim:
            flat_values[key] = value
            continue
        if key not in flat_values:
            flat_values[key] = value.new_zeros(size)
        flat_values[key][at : at + number] = value


def _values_by_key(path: Path, layout: dict, only: str | None) -> dict[str, Any]:
    """Key -> an example of its values in a file; for a tensor of a flat tensor's size,
    an empty one.
    """
    examples = {name.partition("/")[2]: value for name, value in layout["numbers"].items()}
    with _opened(path) as file:
        for name in file.keys():
            key, value = name.partition("/")[2], file.get_slice(name)
            if not value.get_shape():
                examples[key] = file.get_tensor(name).clone()
            elif value.get_dtype() in SLICED and key not in examples:
                examples[key] = value[:0]
    return {key: value for key, value in examples.items() if only in (None, key)}


def _part(
    file, layout: dict, piece: Piece, skip: int, number: int, path: Path, only: str | None
) -> dict[str, Any]:
    """Key -> the values skip to skip + number of a piece in a file, or a value of the
    whole flat tensor.
    """
    prefix, size, values = f"{piece.flat}/", layout["sizes"][piece.flat], {}
    for name in file.keys():
        if not name.startswith(prefix) or only not in (None, name.removeprefix(prefix)):
            continue
        value = file.get_slice(name)
        shape, key = value.get_shape(), name.removeprefix(prefix)
        if not shape:
            values[key] = file.get_tensor(name).clone()
        elif shape == [size] and value.get_dtype() in SLICED:
            values[key] = value[piece.flat_start + skip : piece.flat_start + skip + number]
        else:
            raise ValueError(
                f"{path}: {key} is scaled in blocks of a rank's piece, so it needs as many ranks as wrote it "
                "and the same zero.stage (or a new start from a model folder with train.init_from)"
            )
    for name, value in layout["numbers"].items():
        if name.startswith(prefix) and only in (None, name.removeprefix(prefix)):
            values[name.removeprefix(prefix)] = value
    return values


# ---- state.json ----------------------------------------------------------------------------------


def latest(folder: Path) -> dict:
    """state.json of the step that the file `latest` in folder names; without that file,
    of the newest step.

    Raises ValueError when it is not complete.
    """
    if not (folder / "latest").is_file():
        # It was lost in a copy, or the run was killed before. Steps with state.json are
        # complete.
        return recorded(max((path.parent for path in folder.glob(f"step_*/{STATE}")), key=step_of))
    name = read_text(folder / "latest").strip()
    if not (folder / name / STATE).is_file():
        raise ValueError(
            f"{folder / 'latest'} names {name!r}, but {folder / name / STATE} is missing: "
            f"{recovery_hint(folder, name)}"
        )
    return recorded(folder / name)


def recorded(folder: Path) -> dict:
    """state.json of a step's folder. Raises ValueError when it is damaged."""
    path = folder / STATE
    try:
        record = read_json(path)
    except (OSError, ValueError):
        record = None
    kinds: Mapping[str, type] = {"step": int, "num_files": int, "sha256": dict}
    if record is not None and record.get("format") != FORMAT:
        raise ValueError(
            f"{path}: run state format {record.get('format')!r}, expected {FORMAT}; start a new run with "
            "train.init_from"
        )
    if not _has(record, kinds):
        raise ValueError(
            f"{path} is damaged, expected JSON with {', '.join(kinds)}: "
            f"{recovery_hint(folder.parent, folder.name)}"
        )
    return record


def recovery_hint(folder: Path, name: str) -> str:
    """What the user can do when the step's folder called name is not complete."""
    older = sorted(
        (path.parent for path in folder.glob(f"step_*/{STATE}") if path.parent.name != name), key=step_of
    )
    if older:
        return f"write {older[-1].name} into {folder / 'latest'} to resume from there"
    return "no other step is left; delete the folder of the run, or start another run.name"


def _name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _opened(path: Path):
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # any: safetensors raises errors of other types
        raise ValueError(f"{path}: cannot be read ({error})") from None


def _layout(folder: Path, rank: int) -> dict:
    path = (folder / _name(rank)).with_suffix(".json")
    layout = read_json(path)
    if not _has(layout, LAYOUT):
        raise ValueError(f"{path}: expected {', '.join(LAYOUT)}")
    valid = all(
        len(piece) == 5 and list(map(type, piece)) == [str, int, int, int, int] for piece in layout["pieces"]
    )
    if not valid or any(piece[2] >= len(layout["sizes"]) for piece in layout["pieces"]):
        raise ValueError(f"{path}: expected pieces of name, start, flat, flat_start and number")
    return layout


def _has(record: Any, kinds: Mapping[str, type]) -> TypeGuard[dict[str, Any]]:
    """Whether a value is a dict with these keys, whose values have these types."""
    return isinstance(record, dict) and all(isinstance(record.get(key), kind) for key, kind in kinds.items())
