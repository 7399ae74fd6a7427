"""The drafts in the input windows of training: true tokens, uniform noise, or the
model's own.

A schedule gives the rate at which a slot is redrawn. The rate is 0 at offset 0, the
final token, and grows with the offset (TensorAR, arXiv:2505.16324). A redrawn slot
holds noise, uniform over the codebook, or with tensorar.self_drafts a token sampled
from the model.
Shapes: B batch, S windows, K window size, F factors.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor

from mmtensorar.model import noise

Schedule = Callable[[Sequence[int], Generator | None], Tensor]
"""((B, S, K), generator) -> rates [B, S, K] float32 in [0, 1], with rates[..., 0] = 0."""

# The named schedules: rate as a function of u = offset / K, for u in [0, 1). Each must
# be exactly 0 at u = 0. To add one, add its entry here; recipes are checked against
# these names.
SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda u: u,
    "sine": lambda u: torch.sin(u * (math.pi / 2)),
    "sqrt": torch.sqrt,
    # The paper's full formula is not public; this form is the project's choice.
    "exponential": lambda u: 1 - torch.exp(-2 * u),
    # The paper's noise-free control: the model sees true drafts, so it learns to copy
    # them.
    "none": torch.zeros_like,
    # Not in the paper: every draft is redrawn, so it carries no information about the
    # true tokens, or with tensorar.self_drafts it is the model's own.
    "full": lambda u: (u > 0).float(),
}


@dataclass(frozen=True)
class FixedSchedule:
    """A schedule whose rates depend on the offset alone.

    name: a key of SCHEDULES, or one rate per offset.
    Raises ValueError for an unknown name, rates outside [0, 1], or a first rate above
    0.
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
        """[K] float32: the rate of each offset.

        Raises ValueError if there are not K rates.
        """
        if not isinstance(self.name, str):
            if len(self.name) != window:
                raise ValueError(
                    f"tensorar.schedule has {len(self.name)} rates; expected {window}, "
                    "one per offset of the window"
                )
            return torch.tensor(self.name, dtype=torch.float32)
        return SCHEDULES[self.name](torch.arange(window, dtype=torch.float32) / window)

    def __call__(self, shape: Sequence[int], generator: Generator | None = None) -> Tensor:
        """[B, S, K] float32.

        This schedule draws nothing; generator is for schedules that do.
        """
        return self.rates(shape[2]).expand(*shape)


def input_windows(
    clean: Tensor,
    rates: Tensor,
    factor_sizes: Sequence[int],
    *,
    self_drafts: float = 0.0,
    sample_self_drafts: Callable[[Tensor], Tensor] | None = None,
    generator: Generator | None = None,
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """The input windows of training and validation: true windows whose drafts are
    partly redrawn.

    Training and validation use the same drafts, self-drafts included: a validation loss
    on other drafts would measure an input that the model never sees.

    Args:
        clean: [B, S, K, F] int64, the true windows.
        rates: [B, S, K] float32 in [0, 1], the probability that a slot is redrawn.
        factor_sizes: V of each factor.
        self_drafts: share of the redrawn slots that hold a draft sampled by the model;
            the others hold uniform noise.
        sample_self_drafts: (redrawn [B, S, K] bool) -> drafts that the model samples,
            [B, S, K, F]. It is called only if self_drafts is above 0 and K above 1.
        generator, rows: see `redraw`.

    Returns:
        [B, S, K, F] int64.
    """
    B, S, K, _ = clean.shape
    redrawn_BSK, noise_BSKF = redraw((B, S, K), rates.to(clean.device), factor_sizes, generator, rows)
    inputs_BSKF = torch.where(redrawn_BSK[..., None], noise_BSKF, clean)
    if not self_drafts or K == 1:
        return inputs_BSKF
    assert sample_self_drafts is not None
    self_drafts_BSKF = sample_self_drafts(redrawn_BSK)
    taken_BSK = redrawn_BSK & (uniform((B, S, K), generator, rows, clean.device) < self_drafts)
    return torch.where(taken_BSK[..., None], self_drafts_BSKF, inputs_BSKF)


def redraw(
    shape: tuple[int, int, int],
    rates: Tensor,
    factor_sizes: Sequence[int],
    generator: Generator | None = None,
    rows: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the slots that are redrawn, and draw a random token for every slot.

    One coin covers a token. Each of its factors is then uniform, and so the token is
    uniform over the product codebook: q(x* | x) = (1 - rate) x + rate / V. A redraw may
    hit the same token, so the share of changed tokens is rate * (1 - 1/V).

    Args:
        shape: (B, S, K).
        rates: [B, S, K] in [0, 1].
        factor_sizes: V of each factor.
        generator: draws the noise on its own device, so a CPU generator gives the same
            noise on every device. None draws from the global one, on the device of
            rates.
        rows: (first, number) if these B rows are rows first to first + B - 1 of a
            larger batch of that number. The noise does not depend on how the batch is
            cut.

    Returns:
        redrawn [B, S, K] bool and noise [B, S, K, F] int64.
    """
    device = rates.device if generator is None else generator.device
    first, number = rows or (0, shape[0])
    full_shape = (number, *shape[1:])
    # float32 whatever the model computes in: bfloat16 has too few steps for small
    # rates.
    coin = torch.rand(full_shape, generator=generator, device=device, dtype=torch.float32)
    noise = torch.stack(
        [torch.randint(size, full_shape, generator=generator, device=device) for size in factor_sizes],
        dim=-1,
    )
    coin, noise = (value[first : first + shape[0]].to(rates.device) for value in (coin, noise))
    # rand is in [0, 1): rate 0 never fires and rate 1 always does.
    return coin < rates, noise


def uniform(
    shape: Sequence[int], generator: Generator | None, rows: tuple[int, int] | None, device: torch.device
) -> Tensor:
    """float32 numbers in [0, 1) of a shape whose first axis is the batch.

    generator, rows: see `redraw`.
    """
    return _rows_of(partial(torch.rand, dtype=torch.float32), shape, generator, rows, device)


def random_keys(
    shape: Sequence[int], generator: Generator | None, rows: tuple[int, int] | None, device: torch.device
) -> Tensor:
    """int64 keys for `noise.draw`, of a shape whose first axis is the batch.

    generator, rows: see `redraw`.
    """
    return _rows_of(noise.random_keys, shape, generator, rows, device)


def _rows_of(
    make: Callable[..., Tensor],
    shape: Sequence[int],
    generator: Generator | None,
    rows: tuple[int, int] | None,
    device: torch.device,
) -> Tensor:
    first, number = rows or (0, shape[0])
    draw_device = device if generator is None else generator.device
    numbers = make((number, *shape[1:]), generator=generator, device=draw_device)
    return numbers[first : first + shape[0]].to(device)
