"""Numbers of an array of norms: percentiles with intervals, sample sizes, drift, piles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

Floats = npt.NDArray[np.float64]

TORCH_EPS = 1e-6  # what torch.nn.utils.clip_grad_norm_ adds to the norm
PILE_BAND = 2e-4  # relative width within which norms count as one value
PILE_LEVELS = 5  # a pile is compared with so many values below it
PILE_FACTOR = 4.0
NEARLY_CONSTANT = 0.9
COARSE = 1e-3  # relative step between neighbouring values from which on a log counts as coarse


class Interval(NamedTuple):
    """A 95 % interval; the upper end is inf where the sample gives none, both nan if unknown."""

    low: float
    high: float


@dataclass(frozen=True)
class Drift:
    """How the second half of the norms differs from the first.

    Attributes:
        first: Median of the first half.
        second: Median of the second half.
    """

    first: float
    second: float

    @property
    def ratio(self) -> float:
        """Second median over first; inf or nan where the first is zero."""
        if self.first == 0:
            return math.inf if self.second > 0 else math.nan
        return self.second / self.first


@dataclass(frozen=True)
class Pile:
    """Many norms at one value, as clipping before measuring leaves them.

    Attributes:
        value: The value at which they lie.
        share: Share of all norms there, 0 to 1.
    """

    value: float
    share: float


@dataclass(frozen=True)
class ClipEffect:
    """What one max_norm does to a series of norms; shares are 0 to 1.

    Attributes:
        share: Share of the steps that are clipped.
        first_half: That share in the first half.
        second_half: That share in the second half.
        kept: Mean factor by which the gradients are multiplied ("gradient kept").
    """

    share: float
    first_half: float
    second_half: float
    kept: float


def coefficients(norms: npt.ArrayLike, max_norm: float) -> npt.NDArray[np.float32]:
    """The factor by which torch multiplies the gradients of each step.

    This is ``max_norm / (norm + 1e-6)``, at most 1, in float32 and in torch's order of operations
    (a number over a tensor is a reciprocal and a product there). A step is clipped where the
    factor is below 1.

    >>> coefficients([0.5, 1.0, 4.0], 1.0).round(3).tolist()
    [1.0, 1.0, 0.25]
    >>> bool(coefficients([1.0], 1.0)[0] < 1)
    True
    """
    with np.errstate(over="ignore", divide="ignore", invalid="ignore", under="ignore"):
        single = np.asarray(norms, dtype=np.float64).astype(np.float32)
        factor = np.float32(1.0) / (single + np.float32(TORCH_EPS)) * np.float32(max_norm)
        limited: npt.NDArray[np.float32] = np.minimum(factor, np.float32(1.0))
    return limited


def clip_effect(norms: Floats, max_norm: float) -> ClipEffect:
    """What clipping at `max_norm` does to finite `norms`, in the order of the steps.

    >>> clip_effect(np.array([4.0, 4.0, 1.0, 1.0]), 2.0)
    ClipEffect(share=0.5, first_half=1.0, second_half=0.0, kept=0.75)
    """
    factor = coefficients(norms, max_norm)
    clipped = factor < 1
    half = len(norms) // 2
    return ClipEffect(
        share=float(clipped.mean()),
        first_half=float(clipped[:half].mean()),
        second_half=float(clipped[half:].mean()),
        kept=round(float(factor.mean(dtype=np.float64)), 6),
    )


def clip_share(norms: Floats, max_norm: float) -> float:
    """Share of finite `norms` that torch would clip at `max_norm`, 0 to 1."""
    return float((coefficients(norms, max_norm) < 1).mean())


def percentile(norms: Floats, p: float) -> float:
    """The `p`-th percentile (0 to 100), interpolated as numpy does."""
    return float(np.percentile(norms, p))


def percentile_interval(norms: Floats, p: float, *, effective: float) -> Interval:
    """The 95 % interval of the `p`-th percentile, from order statistics.

    The number of norms below the true percentile is binomial; its 2.5 % and 97.5 % quantiles,
    taken for `effective` independent norms, are ranks between which the percentile lies.

    Args:
        norms: Finite norms, in any order.
        p: The percentile, 0 to 100.
        effective: Effective sample size, see `effective_size`.

    Returns:
        The interval. Its lower end is 0 and its upper end inf where the sample is too small to
        give one: for p99 that is below 368 independent norms.

    >>> percentile_interval(np.arange(1.0, 101.0), 90.0, effective=100.0)
    Interval(low=84.28..., high=95.94...)
    >>> percentile_interval(np.arange(1.0, 101.0), 99.0, effective=100.0).high
    inf
    """
    low, high = _rank_fractions(p / 100, effective)
    ordered = in_order(norms)
    return Interval(
        low=_order_statistic(ordered, low) if low > 0 else 0.0,
        high=_order_statistic(ordered, high) if high < 1 else math.inf,
    )


def size_with_upper_bound(p: float) -> float:
    """How many independent norms give the `p`-th percentile an upper bound.

    >>> round(size_with_upper_bound(99.0))
    367
    """
    return math.log(0.025) / math.log(p / 100) if 0 < p < 100 else math.inf


def mean_interval(norms: Floats) -> Interval:
    """The 95 % interval of the mean, with the effective sample size of the norms themselves."""
    with np.errstate(over="ignore", invalid="ignore"):
        error = float(norms.std(ddof=1)) / math.sqrt(_effective(norms))
        mean = float(norms.mean())
    return Interval(max(0.0, mean - 1.96 * error), mean + 1.96 * error)


def effective_size(norms: Floats, p: float) -> float:
    """How many independent norms the series is worth when its `p`-th percentile is estimated.

    Neighbouring norms are alike, so n of them say less than n independent ones. The
    autocorrelation of "above the percentile" is summed by Geyer's initial positive sequence
    (Geyer 1992, doi:10.1214/ss/1177011137).

    Args:
        norms: Finite norms in the order of the steps.
        p: The percentile, 0 to 100.

    Returns:
        A number from 1 to ``len(norms)``.
    """
    return _effective((norms > np.percentile(norms, p)).astype(np.float64))


def drift(norms: Floats) -> Drift:
    """The medians of both halves.

    >>> drift(np.array([3.0, 3.0, 1.0, 1.0])).ratio
    0.333...
    """
    half = len(norms) // 2
    return Drift(first=float(np.median(norms[:half])), second=float(np.median(norms[half:])))


def pile_up(norms: Floats) -> Pile | None:
    """The value at which norms pile up as if they had been clipped, or None.

    A clipped log is ``min(norm, c)``: its largest value is c and stands there far more often than
    the values next to it. A log that is only rounded has neighbours as frequent as its top.

    >>> pile_up(np.array([0.2, 0.3, 0.5, 0.7] + [1.0] * 26))
    Pile(value=1.0, share=0.866...)
    >>> pile_up(np.repeat([0.1, 0.2, 0.3, 0.4, 0.5], 6)) is None
    True
    """
    values = in_order(norms)
    values = values[values > 0]
    if not len(values):
        return None
    return _top_pile(values) or _constant(values)


def coarseness(norms: Floats) -> float:
    """Relative step between neighbouring values where a log holds few distinct ones, else 0.

    bf16 gives 0.004 to 0.008, two decimals at 0.50 give 0.02.

    >>> coarseness(np.tile([0.25, 0.5, 0.75, 1.0], 10))
    0.4
    >>> coarseness(np.linspace(0.1, 1.0, 40))
    0.0
    """
    values = in_order(norms)
    levels = distinct(values[values > 0])
    if not 1 < len(levels) <= len(values) / 3:
        return 0.0
    low, median, high = np.percentile(values, [10, 50, 90])
    centre = levels[(levels >= low) & (levels <= high)]
    step = float(np.diff(centre if len(centre) > 1 else levels).min()) / float(median or high)
    return step if step > COARSE else 0.0


def in_order(norms: Floats) -> Floats:
    """`norms` sorted; the array itself where it is sorted already."""
    return norms if bool((norms[1:] >= norms[:-1]).all()) else np.sort(norms)


def distinct(ordered: Floats) -> Floats:
    """Each value of a sorted array once."""
    return (
        ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])] if len(ordered) else ordered
    )


def rounded(value: float, digits: int) -> float:
    """`value` with so many significant digits.

    >>> rounded(0.08237, 2)
    0.082
    """
    return float(f"{value:.{digits}g}")


def round_threshold(ordered: Floats, value: float, *, within: Interval | None = None) -> float:
    """`value` with as few digits (at least 2) as leave the share of clipped steps as it is.

    Args:
        ordered: The norms, sorted.
        value: The max_norm to round.
        within: Its interval, which the rounded value must not leave.

    >>> round_threshold(np.linspace(0.0, 1.0, 101), 0.90123)
    0.9
    """
    above = _share_above(ordered, value)
    slack = min(0.004, 0.1 * above) + 1 / len(ordered)
    low, high = within if within and not math.isnan(within.low) else (0.0, math.inf)
    for digits in range(2, 9):
        candidate = rounded(value, digits)
        near = abs(candidate / value - 1) <= 0.02 and low <= candidate <= high
        if near and abs(_share_above(ordered, candidate) - above) <= slack:
            return candidate
    return value


def _share_above(ordered: Floats, value: float) -> float:
    return 1 - float(np.searchsorted(ordered, value, side="right")) / len(ordered)


def _rank_fractions(q: float, n: float) -> tuple[float, float]:
    """Both ranks over n + 1, the way that makes them free of n; 0 and 1 where there are none."""
    low, high = 0.0, 1.0
    if n <= 1 or not 0 < q < 1:
        return low, high
    if (1 - q) ** n < 0.025:
        low = (float(special.bdtrik(0.025, n, q)) + 1) / (n + 1)
    if q**n <= 0.025:
        high = (float(special.bdtrik(0.975, n, q)) + 1) / (n + 1)
    return low, high


def _order_statistic(ordered: Floats, fraction: float) -> float:
    """The norm at rank ``fraction * (n + 1)``, between two norms by interpolation."""
    rank = fraction * (len(ordered) + 1) - 1
    return float(np.interp(rank, np.arange(len(ordered)), ordered))


def _effective(values: Floats) -> float:
    n = len(values)
    scale = float(np.abs(values).max()) if n else 0.0
    if not scale:
        return float(max(n, 1))
    covariance = _autocovariance(values / scale)
    if covariance[0] <= 1e-12:
        return float(n)
    even = len(covariance) - len(covariance) % 2
    pairs = covariance[0:even:2] + covariance[1:even:2]
    stop = np.flatnonzero(pairs <= 0)
    total = float(pairs[: stop[0] if len(stop) else len(pairs)].sum())
    time = 2 * total / float(covariance[0]) - 1
    return min(float(n), max(1.0, n / time)) if time > 0 else float(n)


def _autocovariance(values: Floats) -> Floats:
    """Autocovariances at lags 0 to n // 2; the padding keeps those free of wrap-around."""
    n = len(values)
    size = _smooth(n + n // 2 + 1)
    spectrum = np.fft.rfft(values - values.mean(), size)
    return np.asarray(np.fft.irfft(np.abs(spectrum) ** 2, size)[: n // 2 + 1] / n)


def _smooth(n: int) -> int:
    """The smallest 2^k or 3 x 2^k from `n` up, sizes at which the Fourier transform is fast."""
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if power * 3 // 4 >= n else power


def _top_pile(values: Floats) -> Pile | None:
    end = len(values)
    counts: list[int] = []
    while end and len(counts) <= PILE_LEVELS:
        start = int(np.searchsorted(values, values[end - 1] * (1 - PILE_BAND)))
        counts.append(end - start)
        end = start
    top = counts[0]
    enough = top >= max(5, 0.002 * len(values))
    if enough and top >= PILE_FACTOR * max(counts[1:], default=0):
        return Pile(value=float(np.median(values[-top:])), share=top / len(values))
    return None


def _constant(values: Floats) -> Pile | None:
    middle = float(np.median(values))
    low, high = np.searchsorted(values, [middle * (1 - PILE_BAND), middle * (1 + PILE_BAND)])
    share = float(high - low) / len(values)
    return Pile(value=middle, share=share) if share >= NEARLY_CONSTANT else None
