"""95 % confidence intervals of scores: of one share, of similar pictures, of pairs, and
over seeds.

Pure: numbers in, numbers out. Which interval answers which question:

    wilson              one share of independent pictures
    design_effect       several pictures of one prompt are similar: how much less they count
    cluster_bootstrap   the same without a formula: prompts are resampled with all their pictures
    mean_of_shares      the mean of several shares, each with its own interval
    paired_bootstrap    the difference between two models on the same prompts
    over_seeds          several trainings that differ in their seed, judged on the same prompts
    ratios_to_control   a positive measure, such as a distance, as a multiple of the control's
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np

NUM_RESAMPLES = 10_000
Z = 1.959964  # two-sided 95 % of a normal distribution
MIN_FREEDOM = 5  # degrees of freedom from which on the spread of seeds enters an interval


class Interval(NamedTuple):
    """A share, or a difference of shares, between -1 and 1."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} [{100 * self.low:+.1f} {100 * self.high:+.1f}]"


# ---- one model -----------------------------------------------------------------------------------


def wilson(correct: float, num: float) -> tuple[float, float]:
    """Wilson's interval of the share correct / num. num may be fractional: an effective
    sample size.

    Raises ValueError when num is not above 0 or correct is outside 0..num.
    """
    if not num > 0 or not 0 <= correct <= num:
        raise ValueError(f"wilson needs 0 <= correct <= num and num > 0, got {correct} of {num}")
    share, spread = correct / num, Z * Z / num
    centre = (share + spread / 2) / (1 + spread)
    half = Z * sqrt(share * (1 - share) / num + spread / num / 4) / (1 + spread)
    # At 0 and 1 the limit is exact on paper; rounding must not move it inside.
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == num else min(1.0, centre + half)
    return low, high


def design_effect(skills: Sequence[Sequence[Sequence[bool]]]) -> float:
    """How many pictures carry the information of one independent picture.

    skills: per skill, per prompt, the verdict on each picture. The effect is the
    variance of the prompts' totals over the variance of as many independent pictures.
    It is estimated over all skills together, since one skill has too few prompts, and
    kept within 1 and the largest number of pictures of a prompt. Where no skill has
    both correct and wrong pictures, it is that maximum.
    """
    clustered = independent = 0.0
    for prompts in skills:
        num, num_prompts = sum(map(len, prompts)), len(prompts)
        share = sum(map(sum, prompts)) / num
        if num_prompts < 2:
            continue
        squares = sum((sum(verdicts) - len(verdicts) * share) ** 2 for verdicts in prompts)
        clustered += num_prompts / (num_prompts - 1) * squares / num**2
        independent += share * (1 - share) / num
    most = float(max(len(verdicts) for prompts in skills for verdicts in prompts))
    return min(max(clustered / independent, 1.0), most) if independent else most


def cluster_bootstrap(
    prompts: Sequence[Sequence[bool]], num: int = NUM_RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Resampled shares of correct pictures, [num] float64.

    prompts: per prompt the verdict on each picture. A resample draws as many prompts
    with replacement, each with all its pictures.
    """
    correct = np.array([sum(verdicts) for verdicts in prompts])
    sizes = np.array([len(verdicts) for verdicts in prompts])
    chosen = np.random.default_rng(seed).integers(len(prompts), size=(num, len(prompts)))
    return correct[chosen].sum(axis=1) / sizes[chosen].sum(axis=1)


def percentiles(resamples: np.ndarray) -> list[float]:
    """Limits of the middle 95 % of resampled values [N]."""
    return [float(limit) for limit in np.percentile(resamples, (2.5, 97.5))]


def mean_of_shares(shares: Sequence[float], limits: Sequence[Sequence[float]]) -> Interval:
    """The mean of shares p_s with limits mean -/+ sqrt(sum_s (p_s - limit_s)^2) / S.

    limits: low and high of each share, by its own interval (Zou and Donner 2008,
    https://doi.org/10.1002/sim.3095). Where a share is 0 or 1, the usual sum of
    variances would claim certainty.
    """
    mean = sum(shares) / len(shares)
    low, high = (
        sqrt(sum((share - pair[side]) ** 2 for share, pair in zip(shares, limits, strict=True))) / len(shares)
        for side in (0, 1)
    )
    return Interval(mean, max(0.0, mean - low), min(1.0, mean + high))


# ---- two models on the same prompts --------------------------------------------------------------


def paired_bootstrap(gains: Mapping[str, Sequence[float]], seed: int = 0) -> dict[str, Interval]:
    """The mean gain of each skill, and `overall`: the mean over the skills.

    gains: skill -> per prompt, one model's share of correct pictures minus the other's.
    Prompts are resampled within each skill, so that the difficulty of a prompt, which
    both models share, cancels.
    """
    rng = np.random.default_rng(seed)
    intervals, means, resamples = {}, [], []
    for skill, of_prompts in gains.items():
        array = np.asarray(of_prompts)
        drawn = array[rng.integers(len(array), size=(NUM_RESAMPLES, len(array)))].mean(axis=1)
        intervals[skill] = Interval(float(array.mean()), *percentiles(drawn))
        means.append(array.mean())
        resamples.append(drawn)
    overall = percentiles(np.mean(resamples, axis=0))
    return intervals | {"overall": Interval(float(np.mean(means)), *overall)}


# ---- several seeds -------------------------------------------------------------------------------


class Spread(NamedTuple):
    """How much seeds differ in a group's mean, beyond the chance of sampling
    pictures.

    variance: of the mean. freedom: the degrees of freedom that the variance is
    estimated with.
    """

    variance: float
    freedom: int


def prompts_by_name(groups: Sequence[str]) -> dict[str, list[list[int]]]:
    """Name -> lists of prompt numbers, one list for each group whose mean enters the
    name's mean.

    groups: the group of each prompt. `overall` has one list for each group; a group's
    name has its own prompts alone.
    """
    numbers = {
        group: [index for index, other in enumerate(groups) if other == group]
        for group in dict.fromkeys(groups)
    }
    return {"overall": list(numbers.values()), **{group: [prompts] for group, prompts in numbers.items()}}


def _mean_and_variance(shares: np.ndarray, lists: list[list[int]]) -> tuple[float, float]:
    """The mean of the groups' means, and its variance over prompts, which includes the
    sampling chance.

    shares: [prompts].
    """
    variances = [shares[prompts].var(ddof=1) / len(prompts) for prompts in lists if len(prompts) > 1]
    return float(np.mean([shares[prompts].mean() for prompts in lists])), sum(variances) / len(lists) ** 2


def pooled_spreads(arms: Sequence[np.ndarray], groups: Sequence[str]) -> dict[str, Spread]:
    """Name -> the spread of seeds, pooled over arms, since one arm has too few seeds to
    know its own.

    arms: per arm [seeds, prompts] shares of right pictures.
    """
    spreads = {}
    for name, lists in prompts_by_name(groups).items():
        between, chance, freedom = 0.0, 0.0, 0
        for values in arms:
            if len(values) > 1:
                means = [_mean_and_variance(row, lists)[0] for row in values]
                # The mean over seeds is subtracted first: the difficulty of a prompt is
                # not chance.
                variances = [_mean_and_variance(row, lists)[1] for row in values - values.mean(axis=0)]
                between += (len(values) - 1) * np.var(means, ddof=1)
                chance += len(values) * np.mean(variances)
                freedom += len(values) - 1
        spreads[name] = Spread(max(0.0, between - chance) / max(1, freedom), freedom)
    return spreads


def over_seeds(
    values: np.ndarray, groups: Sequence[str], spreads: Mapping[str, Spread]
) -> dict[str, Interval]:
    """The mean of each group, and `overall`: the mean of the groups' means.

    The variance is that over prompts of the seeds' mean (normal), plus that of the
    seeds with Student's t of the spread's degrees of freedom. Below MIN_FREEDOM the
    spread of seeds is left out, since nothing useful is known about it.

    Args:
        values: [seeds, prompts] shares of right pictures, or differences of shares.
        groups: the group of each prompt.
        spreads: of the seeds, see `pooled_spreads`.

    Raises ValueError when values have another number of prompts than groups.
    """
    if values.shape[1] != len(groups):
        raise ValueError(
            f"a row has verdicts on {values.shape[1]} prompts; expected {len(groups)}, the world's"
        )
    intervals = {}
    for name, lists in prompts_by_name(groups).items():
        value, variance = _mean_and_variance(values.mean(axis=0), lists)
        spread = spreads[name]
        t = student_t(spread.freedom) if spread.freedom >= MIN_FREEDOM else 0.0
        half = float(np.sqrt(1.96**2 * variance + t**2 * spread.variance / len(values)))
        intervals[name] = Interval(value, value - half, value + half)
    return intervals


def ratios_to_control(log_ratios: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float, float]]:
    """Arm -> (ratio, low, high): a measure as a multiple of the control's.

    log_ratios: arm -> per seed, log of the arm's value minus log of the control's.
    Their spread over seeds is pooled over the arms; low and high are nan below
    MIN_FREEDOM.
    """
    several = [logs for logs in log_ratios.values() if len(logs) > 1]
    freedom = sum(len(logs) - 1 for logs in several)
    t = student_t(freedom) if freedom >= MIN_FREEDOM else np.nan
    deviation = np.sqrt(sum(((logs - logs.mean()) ** 2).sum() for logs in several) / max(1, freedom))
    return {
        name: tuple(
            float(np.exp(logs.mean() + sign * (t * deviation / np.sqrt(len(logs)) if sign else 0.0)))
            for sign in (0, -1, 1)
        )
        for name, logs in log_ratios.items()
        if len(logs)
    }


def student_t(freedom: int) -> float:
    """The two-sided 95 % point of Student's t distribution."""
    from scipy import stats

    return float(stats.t.ppf(0.975, freedom))
