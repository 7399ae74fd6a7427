"""Make shards of images and captions, in WebDataset's layout (see
mmtensorar/data/shards.py).

    mmtensorar shards make --folder my_images --out data/mine
        a.jpg with its caption in a.txt or a.json, at any depth
    mmtensorar shards make --jsonl my_images/list.jsonl --out data/mine
        lines {"image": path, "caption": text}
    mmtensorar shards make --csv my_images/list.csv --out data/mine
        columns image and caption
    mmtensorar shards make --parquet rows.parquet --caption-columns short,long \\
        --captions random --out data/mine
    mmtensorar shards make --dataset lambdalabs/naruto-blip-captions \\
        --caption-columns text --out data/naruto
    mmtensorar shards make --tars old_shards --min-side 512 --deduplicate --out data/better
    mmtensorar shards make --class-folder imagenet/train --out data/imagenet
        one sub-folder per class
    mmtensorar shards make --synthesize shapes --num-samples 4096 --out data/shapes

The same arguments give the same bytes, for any number of workers. A finished set is
reused. An interrupted run resumes when the same command is given again.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python puts a script's own folder here; imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse

from data_tools.executors import Executor, OnRay, in_processes
from data_tools.make_options import parse
from data_tools.pipeline import make
from data_tools.storage import is_local, only_writer
from mmtensorar.cli import command, sentence_of
from mmtensorar.data.url_cache import store_errors


def executor(options: argparse.Namespace) -> Executor:
    """The executor that --engine names."""
    return OnRay(options.ray_address, options.workers) if options.engine == "ray" else in_processes


@command
def main(arguments: list[str] | None = None) -> int:
    assert __doc__ is not None
    description, _, epilog = __doc__.partition("\n\n")
    options = parse(arguments, description=description, epilog=epilog)
    try:
        with only_writer(options.out, locks=not options.dry_run):
            make(options, executor(options))
    except (OSError, *store_errors()) as error:  # a store's error may not name the URL
        where = "" if is_local(options.out) else f"{options.out}: "
        raise ValueError(f"{where}{sentence_of(error)}") from error
    except ImportError as error:  # of a store whose library is loaded when it is first used
        raise ValueError(
            f"a library is missing: {sentence_of(error)} (or pip install 'mmtensorar[remote]')"
        ) from error
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
