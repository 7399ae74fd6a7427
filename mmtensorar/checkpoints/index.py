"""checkpoint.json, the index of a model folder.

Reading it imports no torch, so a wrong path is reported at once.
"""

from __future__ import annotations

from pathlib import Path

from mmtensorar.files import read_json

FORMAT = 1
INDEX = "checkpoint.json"


def read_index(folder: str | Path) -> dict:
    """checkpoint.json of a folder.

    Raises ValueError when it is missing, damaged, or of another format.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        hint = ""
        if (Path(folder) / "model" / INDEX).is_file():
            hint = f"; the run's model is in {Path(folder) / 'model'}"
        elif (Path(folder) / "checkpoints").is_dir():
            hint = f"; to make one of an unfinished run: mmtensorar export {folder} --out FOLDER"
        raise ValueError(f"no model folder at {folder}: expected {INDEX}{hint}")
    index = read_json(path)
    if index.get("format") != FORMAT:
        raise ValueError(f"{path}: model folder format {index.get('format')!r}, expected {FORMAT}")
    if not isinstance(index.get("sha256"), dict) or not isinstance(index.get("step"), int):
        raise ValueError(f"{path}: expected a step and the sha256 of each file; the folder is damaged")
    return index
