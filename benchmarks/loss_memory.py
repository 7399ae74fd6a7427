"""Memory and time of the loss over K offsets, beside the loss that holds all logits: python benchmarks/loss_memory.py

The decoder, a head of one matrix and the cross entropy, forward and backward, of 4 pictures of 576 tokens, 1,024 wide, 16,384 codes.
Each K has a process of its own, in which ours and the naive loss take turns. Memory: how far the process's resident
memory rises above what it was before, at most, sampled each millisecond.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import gc
import multiprocessing
import resource
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from mmtensorar.model.codec import WindowDecoder
from mmtensorar.model.tensorar import TensorAR
from mmtensorar.model.windows import slide
from mmtensorar.recipe import Train

MIB = 2**20


class Sizes(NamedTuple):
    batch: int = 4
    tokens: int = 576
    dim: int = 1024
    codes: int = 16_384
    rounds: int = 2


class Head(nn.Module):
    def __init__(self, dim: int, num_codes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_codes, dim) / dim**0.5)

    def forward(self, hidden: Tensor, prev: Tensor) -> Tensor:
        return functional.linear(hidden, self.weight)


class HeadOnly(nn.Module):
    """What the loss needs of a backbone."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.dim, self.num_tokens, self.factor_sizes = sizes.dim, sizes.tokens, (sizes.codes,)
        self.head = Head(sizes.dim, sizes.codes)


def naive(model: TensorAR, hidden: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """All B * T * K rows of logits at once."""
    logits = model.backbone.head(model._states(hidden), targets[..., :0]).float()
    losses = functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(
        targets.shape[:-1]
    )
    return torch.where(valid, losses, 0).sum((0, 1))


def ours(model: TensorAR, hidden: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    return model._summed_loss(hidden, targets, valid)[0]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def risen(work: Callable[[], object]) -> tuple[float, float]:
    """(MiB above the start, seconds) of a piece of work."""
    gc.collect()
    before, highest, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    work()
    elapsed = time.perf_counter() - began
    done.set()
    watcher.join()
    return (highest - before) / MIB, elapsed


def measure(window: int, sizes: Sizes) -> dict[str, tuple[float, float]]:
    """MiB and seconds of each loss at a window, and the largest difference of gradients, relative to the largest gradient."""
    torch.manual_seed(0)
    backbone = HeadOnly(sizes)
    decoder = WindowDecoder(sizes.dim, window, num_heads=8) if window > 1 else None
    encoder = nn.Identity() if window > 1 else None
    chunk = Train.model_fields["loss_chunk_tokens"].default
    model = TensorAR(
        backbone, encoder, decoder, lambda *_: None, offset_weights=[1.0] * window, chunk_tokens=chunk
    )
    hidden = torch.randn(sizes.batch, sizes.tokens, sizes.dim, requires_grad=True)
    targets, valid = slide(torch.randint(sizes.codes, (sizes.batch, sizes.tokens, 1)), window)
    # The gradients are there before, so that they are not counted.
    for tensor in (hidden, *model.parameters()):
        tensor.grad = torch.zeros_like(tensor)
    found: dict[str, tuple[float, float]] = {}
    gradients = {}
    for turn in range(sizes.rounds):
        for name, loss in (("ours", ours), ("naive", naive)):
            for tensor in (hidden, *model.parameters()):
                tensor.grad.zero_()
            memory, elapsed = risen(lambda loss=loss: loss(model, hidden, targets, valid).sum().backward())
            memory, elapsed = (
                min(pair) for pair in zip(found.get(name, (memory, elapsed)), (memory, elapsed), strict=True)
            )
            found[name] = (memory, elapsed)
            if turn == 0:
                gradients[name] = [tensor.grad.clone() for tensor in (hidden, *model.parameters())]
    apart = max(
        ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
        for a, b in zip(*gradients.values(), strict=True)
    )
    return found | {"gradients": (apart, 0.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in Sizes()._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 2, 4, 8])
    options = vars(parser.parse_args())
    windows = options.pop("windows")
    sizes = Sizes(**options)
    print("| K | ours, MiB | naive, MiB | ours, s | naive, s | ours / naive, time | gradients apart |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    peaks = {}
    for window in windows:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(measure, window, sizes).result()
        (peaks[window], seconds), (memory, reference) = found["ours"], found["naive"]
        row = f"| {window} | {peaks[window]:,.0f} | {memory:,.0f} | {seconds:.1f} | {reference:.1f} | {seconds / reference:.2f} |"
        print(f"{row} {found['gradients'][0]:.1e} |", flush=True)
    first, last = windows[0], windows[-1]
    print(f"\nmemory at K={last} over K={first}: {peaks[last] / peaks[first]:.2f}")


if __name__ == "__main__":
    main()
