"""GenEval's folder of images: NNNNN/metadata.jsonl and NNNNN/samples/<digits>.png, NNNNN counting prompts from 00000.

Unlike the official scorer, which scores what it finds, reading is strict: a prompt or an image that is missing is an
error that names it.
"""

import json
import os
from pathlib import Path

from PIL import Image, ImageOps

RECORD = "generation.json"  # which checkpoint and settings the images come from; see run.py


def image_path(folder: Path, prompt_index: int, image_index: int) -> Path:
    return folder / f"{prompt_index:05d}" / "samples" / f"{image_index:05d}.png"


def prompt_folders(folder: Path) -> list[Path]:
    """The prompts' folders in order. Raises ValueError when there is none or one between them is missing."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    found = {int(path.name): path for path in folder.iterdir() if path.name.isdigit() and path.is_dir()}
    if not found:
        raise ValueError(f"{folder} holds no images; expected {image_path(Path(), 0, 0)}")
    for index in range(max(found) + 1):
        if index not in found:
            raise ValueError(f"{folder / f'{index:05d}'} is missing, the folder of prompt {index} of {max(found) + 1}")
    return [found[index] for index in sorted(found)]


def image_files(folder: Path, *, num_prompts: int | None = None, num_images: int | None = None) -> list[list[Path]]:
    """Per prompt its images' files, all prompts with the same number of images.

    num_prompts, num_images (per prompt): how many there must be; None takes what is there. Raises ValueError, naming
    the first file that is missing.
    """
    folders = prompt_folders(folder)
    if num_prompts is not None and len(folders) != num_prompts:
        raise ValueError(f"{folder} holds {len(folders)} prompts; expected {num_prompts}")
    files = []
    for prompt in folders:
        found = {int(p.stem): p for p in (prompt / "samples").glob("*.png") if p.stem.isdigit()}
        files.append([found[index] for index in sorted(found)])
    expected = num_images or max(map(len, files))
    for index, images in enumerate(files):
        if len(images) != expected or not images:
            numbers = {int(image.stem) for image in images}
            absent = next((i for i in range(expected) if i not in numbers), None)
            named = f"; {image_path(folder, index, absent)} is missing" if absent is not None else ""
            raise ValueError(f"{folders[index]} holds {len(images)} images; expected {max(expected, 1)} per prompt{named}")
    return files


def open_image(path: Path) -> Image.Image:
    """An image in RGB, turned as its EXIF says. Raises ValueError, naming the file, when it cannot be read."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    # Pillow raises SyntaxError for some broken PNG files.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from None


def read_record(folder: Path) -> dict:
    """generation.json of a folder of images; empty when there is none."""
    return read_json(folder / RECORD) if (folder / RECORD).is_file() else {}


def read_json(path: Path) -> dict:
    """A file that holds one JSON object. Raises ValueError, naming it, when it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected one JSON object")
    return value


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
