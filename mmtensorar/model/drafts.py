"""Noise on the input windows: how often a slot is resampled, and the resampling.

A schedule gives the probability that a slot is redrawn uniformly over the
codebook. It is 0 at offset 0, the final token, and grows with the offset
(TensorAR, arXiv:2505.16324). Shapes: B batch, T image tokens, K window, F factors.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

Schedule = Callable[[tuple[int, int, int], Generator | None], Tensor]
"""((B, T, K), generator) -> rates [B, T, K] float32 in [0, 1], with rates[..., 0] = 0."""

# Rate as a function of u = offset / K, for u in [0, 1). Each must be exactly 0 at u = 0.
SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda u: u,
    "sine": lambda u: torch.sin(u * (math.pi / 2)),
    "sqrt": torch.sqrt,
    # The paper's full formula is not public; this form is the project's choice.
    "exponential": lambda u: 1 - torch.exp(-2 * u),
    # The paper's noise-free control: with clean drafts in view the model learns to copy.
    "none": torch.zeros_like,
    # Not the paper's: every draft is redrawn, so that it carries nothing, or with tensorar.self_drafts is the model's own.
    "full": lambda u: (u > 0).float(),
}


@dataclass(frozen=True)
class FixedSchedule:
    """The schedule of that name, or of these rates, one per offset: the rate depends on the offset alone.

    Raises ValueError for a name that is not in SCHEDULES, or rates outside [0, 1] or above 0 at offset 0.
    """

    name: str | Sequence[float]

    def __post_init__(self) -> None:
        if isinstance(self.name, str):
            if self.name not in SCHEDULES:
                raise ValueError(
                    f"tensorar.schedule is {self.name!r}; expected one of {', '.join(SCHEDULES)}, or rates"
                )
            return
        object.__setattr__(self, "name", tuple(self.name))
        if not self.name or self.name[0] != 0 or not all(0 <= rate <= 1 for rate in self.name):
            raise ValueError(
                f"tensorar.schedule is {list(self.name)}; expected rates from 0 to 1, the first of them 0"
            )

    def rates(self, window: int) -> Tensor:
        """[K] float32: the rate at each offset. Raises ValueError for another number of rates."""
        if not isinstance(self.name, str):
            if len(self.name) != window:
                raise ValueError(
                    f"tensorar.schedule has {len(self.name)} rates; expected {window}, one per offset of the window"
                )
            return torch.tensor(self.name, dtype=torch.float32)
        return SCHEDULES[self.name](torch.arange(window, dtype=torch.float32) / window)

    def __call__(self, shape: tuple[int, int, int], generator: Generator | None = None) -> Tensor:
        """[B, T, K] float32. The generator is for schedules that draw their rates; this one does not."""
        return self.rates(shape[2]).expand(shape)


def redraw(
    shape: tuple[int, int, int],
    rates: Tensor,
    factor_sizes: tuple[int, ...],
    generator: Generator | None = None,
    rows: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Which slots of windows [B, T, K, F] are redrawn, and what would stand there: [B, T, K] bool, [B, T, K, F] int64.

    shape: (B, T, K). rates: [B, T, K] in [0, 1]. factor_sizes: V of each factor. rows: (first, number) when these are the B rows from
    first on of a larger batch, whose noise does not depend on how it is cut. One coin covers a token; each factor is then uniform,
    which is uniform over the product codebook. Noise is drawn on the generator's device (without one, on that of the rates), so a
    CPU generator gives the same noise on every device.
    """
    device = rates.device if generator is None else generator.device
    first, number = rows or (0, shape[0])
    whole = (number, *shape[1:])
    # float32 whatever the model computes in: bfloat16 has too few steps for small rates.
    coin = torch.rand(whole, generator=generator, device=device, dtype=torch.float32)
    drawn = torch.stack(
        [torch.randint(size, whole, generator=generator, device=device) for size in factor_sizes], dim=-1
    )
    coin, drawn = (value[first : first + shape[0]].to(rates.device) for value in (coin, drawn))
    # rand is in [0, 1): rate 0 never fires and rate 1 always does.
    return coin < rates, drawn


def corrupt(
    windows: Tensor,
    rates: Tensor,
    factor_sizes: tuple[int, ...],
    generator: Generator | None = None,
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """Resample each slot with its rate: q(x* | x) = (1 - rate) x + rate / V.

    windows: [B, T, K, F] int64. The others: see `redraw`. Returns a new [B, T, K, F]. A redraw may hit the same token,
    so the share of changed tokens is rate * (1 - 1/V).
    """
    redrawn, drawn = redraw(tuple(windows.shape[:3]), rates.to(windows.device), factor_sizes, generator, rows)
    return torch.where(redrawn[..., None], drawn, windows)


def invert_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """Probabilities [..., V], not normalised, and numbers in [0, 1) [...] -> [...]: the token whose slice of the line holds the number.

    One number per token, where a categorical draw takes V: so every row can have its own
    generator at no cost. float64, for V is in the thousands and the slices are thin.
    """
    line = probs.cumsum(-1)
    total = line[..., -1:]
    point = torch.minimum(uniform[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # right=True: the first token whose slice ends beyond the point, never an empty slice.
    return torch.searchsorted(line, point, right=True)[..., 0]
