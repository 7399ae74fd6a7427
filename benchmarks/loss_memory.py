"""Memory and time of the loss over K offsets, compared with a loss that holds all
logits at once.

    python benchmarks/loss_memory.py [--windows 1 2 4 8]

It measures decoder, a head of one matrix and cross entropy, forward and backward, by
default for 4 images of 576 tokens, width 1,024 and 16,384 codes. Each K runs in a
process of its own, in which the two losses take turns. Memory is the largest rise of
the process's resident memory, sampled every millisecond.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import resource
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from mmtensorar.model.codec import WindowDecoder
from mmtensorar.model.drafts import FixedSchedule
from mmtensorar.model.loss import window_loss
from mmtensorar.model.tensorar import TensorAR
from mmtensorar.model.windows import slide

MIB = 2**20


class Sizes(NamedTuple):
    """batch: B.

    tokens: T. dim: D. codes: V. rounds: turns of each loss; the best one counts.
    """

    batch: int = 4
    tokens: int = 576
    dim: int = 1024
    codes: int = 16_384
    rounds: int = 2


class Measured(NamedTuple):
    """mib: rise of resident memory. seconds: of forward and backward."""

    mib: float
    seconds: float


class Head(nn.Module):
    """One matrix, [..., D] -> [..., V]; see mmtensorar.model.protocols.Head."""

    def __init__(self, dim: int, num_codes: int):
        super().__init__()
        self.output = nn.Linear(dim, num_codes, bias=False)

    @property
    def output_maps(self) -> Sequence[nn.Module]:
        return (self.output,)

    def states(self, hidden: Tensor, prev: Tensor) -> Tensor:
        return hidden

    def forward(self, hidden: Tensor, prev: Tensor) -> Tensor:
        return self.output(hidden)


class HeadOnly(nn.Module):
    """The parts of a backbone that the loss needs."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.dim, self.num_tokens, self.factor_sizes = sizes.dim, sizes.tokens, (sizes.codes,)
        self.head = Head(sizes.dim, sizes.codes)


def naive(model: TensorAR, hidden: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """[] the loss with all B * T * K rows of logits at once.

    Arguments: see `window_loss`.
    """
    logits = model.backbone.head(model.offset_states(hidden), targets[..., :0]).float()
    losses = functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    losses_BTK = losses.view(targets.shape[:-1])
    return (torch.where(valid, losses_BTK, 0).sum((0, 1)) / (len(hidden) * valid.sum(0))).sum()


def ours(model: TensorAR, hidden: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """[] the same loss by `window_loss`, in chunks."""
    return window_loss(
        hidden,
        targets,
        valid,
        offset_states=model.offset_states,
        head=model.backbone.head,
        offset_weights=model.offset_weights,
        settings=model.loss_settings,
        training=True,
    ).loss


LOSSES = {"ours": ours, "naive": naive}


def resident_bytes() -> int:
    """This process's resident memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure_run(work: Callable[[], object]) -> Measured:
    """Memory and time of one call."""
    gc.collect()
    before, done = resident_bytes(), threading.Event()
    highest = before

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    work()
    elapsed = time.perf_counter() - began
    done.set()
    watcher.join()
    return Measured((highest - before) / MIB, elapsed)


def measure(window: int, sizes: Sizes) -> tuple[dict[str, Measured], float]:
    """The lowest memory and time of each loss, and how far their gradients differ.

    The difference is the largest one, relative to the largest gradient of the same
    tensor.
    """
    torch.manual_seed(0)
    backbone: Any = HeadOnly(sizes)
    decoder = WindowDecoder(sizes.dim, window, num_heads=8) if window > 1 else None
    encoder: Any = nn.Identity() if window > 1 else None
    model = TensorAR(backbone, encoder, decoder, FixedSchedule("none"), offset_weights=[1.0] * window)
    hidden = torch.randn(sizes.batch, sizes.tokens, sizes.dim, requires_grad=True)
    targets, valid = slide(torch.randint(sizes.codes, (sizes.batch, sizes.tokens, 1)), window)
    # Allocated before, so that the gradients do not count as memory of a loss.
    gradients = []
    for tensor in (hidden, *model.parameters()):
        tensor.grad = torch.zeros_like(tensor)
        gradients.append(tensor.grad)
    runs: dict[str, list[Measured]] = {name: [] for name in LOSSES}
    first_gradients: dict[str, list[Tensor]] = {}
    for _ in range(sizes.rounds):
        for name, loss in LOSSES.items():
            for gradient in gradients:
                gradient.zero_()
            runs[name].append(measure_run(lambda loss=loss: loss(model, hidden, targets, valid).backward()))
            first_gradients.setdefault(name, [gradient.clone() for gradient in gradients])
    best = {
        name: Measured(min(run.mib for run in rounds), min(run.seconds for run in rounds))
        for name, rounds in runs.items()
    }
    difference = max(
        ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
        for a, b in zip(first_gradients["ours"], first_gradients["naive"], strict=True)
    )
    return best, difference


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    for name, default in Sizes()._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 2, 4, 8])
    options = vars(parser.parse_args(arguments))
    windows = options.pop("windows")
    sizes = Sizes(**options)
    print("| K | ours, MiB | naive, MiB | ours, s | naive, s | ours / naive, time | gradients differ by |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    peaks = {}
    for window in windows:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            best, difference = pool.submit(measure, window, sizes).result()
        ours, naive = best["ours"], best["naive"]
        peaks[window] = ours.mib
        print(
            f"| {window} | {ours.mib:,.0f} | {naive.mib:,.0f} | {ours.seconds:.1f} | {naive.seconds:.1f} "
            f"| {ours.seconds / naive.seconds:.2f} | {difference:.1e} |",
            flush=True,
        )
    first, last = windows[0], windows[-1]
    print(f"\nmemory at K={last} over K={first}: {peaks[last] / peaks[first]:.2f}")


if __name__ == "__main__":
    main()
