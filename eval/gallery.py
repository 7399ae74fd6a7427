"""Images of evaluated models side by side, framed green when correct and red when
not.

    python -m eval.gallery FOLDER [NAME=FOLDER ...] --out gallery.png [--num-prompts 12] [--num-images 4]

FOLDER is an --out folder of python -m eval.geneval, or images in its layout (then
without frames). Each row is a prompt, and shows its first images. The prompts are the
first ones of each skill, so that they are not chosen by their images.
"""

import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from eval import layout
from eval.report_table import by_name
from mmtensorar import files
from mmtensorar.cli import Parser, command

GREEN, RED, GREY, INK = (40, 150, 60), (205, 45, 45), (190, 190, 190), (20, 20, 20)
FRAME, GAP, BETWEEN = 2, 4, 16
FONT_SIZE, CAPTION_WIDTH, CAPTION_CHARACTERS = 14, 200, 26


def pick(prompts: list[dict], num_prompts: int) -> list[int]:
    """Indices of the first prompts of every skill, num_prompts in all, in order.

    Raises ValueError when num_prompts is smaller than the number of skills.
    """
    skills = list(dict.fromkeys(prompt["tag"] for prompt in prompts))
    per_skill = num_prompts // len(skills)
    if not per_skill:
        raise ValueError(
            f"number of prompts is {num_prompts}; expected at least one per skill, {len(skills)}"
        )
    return [
        index
        for skill in skills
        for index in [i for i, prompt in enumerate(prompts) if prompt["tag"] == skill][:per_skill]
    ]


def read(folder: Path) -> tuple[list[dict], list[list[Path]], dict[Path, bool]]:
    """A folder's prompts, the image files of each, and the verdict on each file that
    results.jsonl has.

    Raises ValueError naming the file that is missing or damaged.
    """
    images = folder
    if not any(path.name.isdigit() for path in folder.glob("*")) and (folder / "summary.json").is_file():
        images = Path(files.read_json(folder / "summary.json").get("images", folder))
    pictures = layout.image_files(images)
    prompts = [files.read_json(paths[0].parent.parent / "metadata.jsonl") for paths in pictures]
    for paths, prompt in zip(pictures, prompts, strict=True):
        if not isinstance(prompt.get("tag"), str) or not isinstance(prompt.get("prompt"), str):
            raise ValueError(f"{paths[0].parent.parent / 'metadata.jsonl'}: expected a tag and a prompt")
    results = folder / "results.jsonl"
    verdicts = {}
    if results.is_file():
        for _, row in files.read_json_lines(results):
            if not isinstance(row.get("filename"), str) or not isinstance(row.get("correct"), bool):
                raise ValueError(f"{results}: expected filename and correct in every line")
            verdicts[images / row["filename"]] = row["correct"]
    return prompts, pictures, verdicts


def compose(
    folders: Mapping[str, Path], *, num_prompts: int = 12, num_images: int = 4, scale: int = 2
) -> Image.Image:
    """The gallery as one image.

    Args:
        folders: column heading -> folder.
        num_prompts: over all skills.
        num_images: per prompt and folder.
        scale: screen pixels per image pixel.

    Raises ValueError when the folders have different prompts or fewer images than asked
    for.
    """
    read_folders = {name: read(folder) for name, folder in folders.items()}
    prompts = next(iter(read_folders.values()))[0]
    for name, (prompts_there, pictures, _) in read_folders.items():
        if prompts_there != prompts:
            raise ValueError(f"the prompts of {folders[name]} and {next(iter(folders.values()))} differ")
        if len(pictures[0]) < num_images:
            raise ValueError(
                f"{folders[name]} holds {len(pictures[0])} images per prompt; {num_images} asked for"
            )
    chosen = pick(prompts, num_prompts)
    first = layout.open_image(next(iter(read_folders.values()))[1][0][0])
    width, height = (side * scale for side in first.size)
    cell_width, cell_height = width + 2 * FRAME + GAP, max(height + 2 * FRAME + GAP, 4 * FONT_SIZE)
    block = num_images * cell_width + BETWEEN
    font = ImageFont.load_default(FONT_SIZE)
    top = 2 * FONT_SIZE
    sheet = Image.new("RGB", (CAPTION_WIDTH + len(folders) * block, top + len(chosen) * cell_height), "white")
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate(folders):
        pen.text((CAPTION_WIDTH + column * block, FONT_SIZE // 2), name, INK, font)
    for row, index in enumerate(chosen):
        y = top + row * cell_height
        caption = textwrap.wrap(prompts[index]["prompt"], CAPTION_CHARACTERS, max_lines=3, placeholder=" ...")
        pen.multiline_text((GAP, y), "\n".join(caption), INK, font)
        for column, (_, pictures, verdicts) in enumerate(read_folders.values()):
            for number, path in enumerate(pictures[index][:num_images]):
                x = CAPTION_WIDTH + column * block + number * cell_width
                frame = {True: GREEN, False: RED, None: GREY}[verdicts.get(path)]
                pen.rectangle((x, y, x + width + 2 * FRAME - 1, y + height + 2 * FRAME - 1), fill=frame)
                # Nearest: enlarged pixels should look like pixels.
                image = layout.open_image(path).resize((width, height), Image.Resampling.NEAREST)
                sheet.paste(image, (x + FRAME, y + FRAME))
    return sheet


@command
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m eval.gallery",
        description="Images of several models side by side.",
        example="runs/eval/plain new=runs/eval/tensorar --out gallery.png",
    )
    parser.add_argument("folders", nargs="+", metavar="[NAME=]FOLDER")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    parser.add_argument("--num-prompts", type=int, default=12, help="over all skills (default 12)")
    parser.add_argument("--num-images", type=int, default=4, help="per prompt (default 4)")
    parser.add_argument("--scale", type=int, default=2, help="screen pixels per image pixel (default 2)")
    options = parser.parse_args(arguments)
    if min(options.num_prompts, options.num_images, options.scale) < 1:
        raise ValueError("--num-prompts, --num-images and --scale must be 1 or more")
    kind = Image.registered_extensions().get(options.out.suffix.lower())
    if kind is None:
        raise ValueError(f"--out is {options.out}; expected the name of a picture, such as gallery.png")
    sheet = compose(
        by_name(options.folders, "folders"),
        num_prompts=options.num_prompts,
        num_images=options.num_images,
        scale=options.scale,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_path(options.out) as temporary:
        sheet.save(temporary, kind)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
