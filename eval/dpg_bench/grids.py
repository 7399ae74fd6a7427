"""Generated pictures as the official script takes them: python -m eval.dpg_bench grids
FOLDER --out GRIDS
"""

from __future__ import annotations

from pathlib import Path

from eval import harness, layout
from eval.dpg_bench import pictures
from mmtensorar import files
from mmtensorar.cli import command
from mmtensorar.words import counted


@command
def main(arguments: list[str] | None = None) -> int:
    parser = harness.make_parser(
        "eval.dpg_bench grids",
        "Write generated pictures as the official script takes them: <item_id>.png, 2 x 2.",
        example="runs/eval/NAME --out grids/",
    )
    parser.add_argument("folder", type=Path, help="the folder that --ckpt generated")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    options = parser.parse_args(arguments)
    num_written = 0
    for images in layout.image_files(options.folder, num_images=pictures.CELLS):
        metadata = images[0].parent.parent / "metadata.jsonl"
        item = files.read_json(metadata).get("item_id")
        if not isinstance(item, str) or not item or "/" in item or item.startswith("."):
            raise ValueError(f"{metadata}: item_id is {item!r}; expected a name, as --ckpt writes it")
        pictures.write_grid([layout.open_image(path) for path in images], options.out / f"{item}.png")
        num_written += 1
    print(f"{counted(num_written, 'grid')} in {options.out}")
    return 0
