"""FID, sFID, Inception score, precision and recall of a model, of pictures, or of
recorded features.

    python -m eval.fid --ckpt runs/NAME/model --ref imagenet256.npz    generates 50,000, then scores
    python -m eval.fid --images FOLDER_OR_NPZ --ref FOLDER_OR_NPZ      scores pictures of any origin
    python -m eval.fid score --features features.npz                   recorded.py

--ref: an .npz of ADM's evaluator (arr_0, and mu, sigma, mu_s, sigma_s, which FID and
sFID then use), or a folder. --ckpt: a class-conditional model; each class gets as many
pictures. --out receives summary.json and, so that an interrupted run resumes, features/
and the pictures. Under a launcher (torchrun) every rank generates its share, and the
first rank scores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eval import harness
from eval.fid import features, recorded, score, sources
from mmtensorar.files import sha256
from mmtensorar.words import counted

if TYPE_CHECKING:
    from mmtensorar.pipeline import Generator

NUM_IMAGES = 50_000  # of published numbers


def class_prompts(generator: Generator) -> list[dict]:
    """A prompt per class.

    Raises ValueError for a model that is not class-conditional.
    """
    if generator.caption_encoder.kind != "class":
        raise ValueError(
            "this model takes captions; FID here is for class-conditional models, or for pictures (--images)"
        )
    return [{"prompt": str(number)} for number in range(generator.caption_encoder.num_classes)]


def enough(pictures: sources.Pictures) -> sources.Pictures:
    """The pictures.

    Raises ValueError, naming the folder or file, when they are too few for precision
    and recall.
    """
    if pictures.num <= score.NEIGHBOURS:
        found = counted(pictures.num, "picture")
        raise ValueError(f"{pictures.name}: {found}; expected {score.NEIGHBOURS + 1} or more")
    return pictures


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.make_parser(
        "eval.fid",
        "FID, sFID, Inception score, precision and recall.\n\nOther command: score (recorded features).",
        example="--ckpt runs/NAME/model --ref VIRTUAL_imagenet256_labeled.npz",
    )
    harness.add_options(
        parser,
        ckpt="class-conditional model folder, such as runs/NAME/model",
        images="a folder, or an .npz with arr_0, uint8 [N, H, W, 3]",
        num_images=f"in all, equally many of each class (default {NUM_IMAGES})",
        allow_partial=False,
    )
    parser.add_argument(
        "--ref", type=Path, required=True, metavar="PATH", help="ADM's reference .npz, or a folder"
    )
    parser.add_argument(
        "--inception", type=Path, metavar="FILE", help="torch-fidelity's weights; default: downloaded once"
    )
    recorded.add_split_size(parser)
    return harness.parse(parser, arguments, split_size=1)


def evaluate(options: argparse.Namespace) -> None:
    """Generate or take pictures, compute features, print and write the metrics.

    Raises ValueError.
    """
    if not harness.has_work(options):
        return
    # A wrong path is reported before hours of generating.
    statistics = sources.reference_statistics(options.ref)
    reference = enough(sources.find(options.ref))

    def work(generator: Generator) -> harness.Work:
        prompts = class_prompts(generator)
        total = options.num_images or NUM_IMAGES
        per_class, rest = divmod(total, len(prompts))
        if rest or not per_class:
            raise ValueError(f"--num-images is {total}; expected a multiple of the {len(prompts)} classes")
        return prompts, per_class

    default_out = options.images and Path("runs/eval") / f"{options.images.stem}_fid"
    pictures = harness.pictures(
        options, "class_conditional", work, default_out=default_out, ignored=["num_images"]
    )
    if pictures is None:
        return
    folder, out = pictures.folder, pictures.out
    samples = enough(sources.find(folder, num_prompts=pictures.num_prompts, num_images=pictures.num_images))

    from eval.fid.inception import Inception
    from mmtensorar import devices

    network = Inception.load(options.inception, devices.pick(options.device))
    arrays: dict[str, np.ndarray] = {}
    for side, source in (("ref", reference), ("sample", samples)):
        extracted = features.extract(source, network, network.name, out / "features", options.batch_size)
        arrays |= {f"{side}_{kind}": array for kind, array in extracted.items()}
    metrics = recorded.measure(arrays, options.split_size, statistics)
    summary = {
        "benchmark": "class_conditional",
        **metrics,
        "num_images": samples.num,
        "images_sha256": sha256(folder) if folder.is_file() else None,
        "reference": str(options.ref),
        "reference_sha256": sha256(options.ref) if options.ref.is_file() else None,
        "reference_images": reference.num,
        "statistics_of_the_reference": {
            kind: "in the file" if kind in statistics else "of its pictures" for kind in ("pool", "spatial")
        },
        "inception": network.name,
        "split_size": options.split_size,
        **harness.origin(folder),
    }
    harness.write_summary(out, summary)
    print(f"\n{counted(samples.num, 'picture')} of {folder} against {options.ref}, {network.name}")
    recorded.show(metrics)
    if samples.num < NUM_IMAGES:
        print(
            f"NOT comparable with published numbers, which are of {NUM_IMAGES:,} pictures: "
            "FID falls as their number grows"
        )
    print(f"\n{out / 'summary.json'}")


@harness.command
def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments and arguments[0] == "score":
        return recorded.main(arguments[1:])
    evaluate(parse(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
