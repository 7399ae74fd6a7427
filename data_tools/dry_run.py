"""make_shards.py --dry-run: try the first items, write nothing, and estimate the
set.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from data_tools.build_stages import SetSettings
from data_tools.listed_source import ListedSource
from data_tools.samples import FilteredOut, SampleSettings, make_sample
from mmtensorar.words import counted

NUM_TRIED = 200  # items
NUM_EXAMPLES = 3  # captions that are printed


def show(source: ListedSource, samples: SampleSettings, settings: SetSettings, out: Path) -> None:
    """Print how many of the first items would be kept, why not, and what the set would
    be.

    Args:
        source: The source whose items are tried.
        samples: How samples are made.
        settings: How the set is made.
        out: Folder of the set.
    """
    tried = source.items[:NUM_TRIED]
    sizes: list[int] = []
    examples: list[str] = []
    reasons: Counter[str] = Counter()
    num_damaged = 0
    for number, item in enumerate(tqdm(tried, desc="trying", unit=" images", disable=None)):
        try:
            sample = make_sample(f"{number:09d}", item, samples).sample
        except FilteredOut as reason:
            reasons[str(reason)] += 1
        except ValueError as error:
            num_damaged += 1
            reasons[f"error: {error}"] += 1
        else:
            # In a tar each member has a header, and both are padded.
            sizes.append(sum(512 + -(-len(content) // 512) * 512 for content in sample.members.values()))
            if len(examples) < NUM_EXAMPLES:
                examples.append(f"  {item.key}: {item.captions[0][:100]!r}")
    num_items = counted(len(source.items), "item")
    print(f"{source.name}: {num_items}; of the first {len(tried)}, {len(sizes)} would be kept")
    for reason, count in reasons.most_common(10):
        print(f"  {count} left out: {reason}")
    if num_damaged and settings.on_error == "raise":
        print(f"  {num_damaged} of these would stop the work; with --on-error skip they are left out")
    if not sizes:
        print("nothing would be left")
        return
    print("\n".join(examples))
    num_samples = len(sizes) / max(1, len(tried)) * len(source.items)
    _print_estimate(num_samples, sum(sizes) / len(sizes), settings, out)


def _print_estimate(num_samples: float, mean: float, settings: SetSettings, out: Path) -> None:
    """mean: bytes of a sample."""
    per_shard = (
        max(1, settings.bytes_per_shard // mean) if settings.bytes_per_shard else settings.samples_per_shard
    )
    num_shards = max(1, math.ceil(num_samples / per_shard))
    print(
        f"about {counted(round(num_samples), 'sample')} of {mean:,.0f} bytes, "
        f"{num_samples * mean / 1e6:,.1f} MB in {counted(num_shards, 'shard')}"
    )
    if settings.validation_share:
        num_validation = num_samples * settings.validation_share
        print(f"about {num_validation:.0f} of them for validation, in {out}_validation")
