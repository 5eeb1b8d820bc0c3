"""Two arms over paired seeds: effect, interval, P(A better), ties, failures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

Relation = Literal["better", "worse", "equal", "undecided"]
Floats = npt.NDArray[np.float64]

# One-sided errors per look. For "better" and "worse": two looks at .02 err in .036 of equal pairs,
# and failures and a second question bring a study to .05. From 40 runs up ten seeds, so a third
# look, can be reached: .01, .02, .02 err in .042; three seeds decide little, so spend little.
LEVEL = 0.02
FIRST_OF_THREE = 0.01
THREE_LOOKS_FROM = 40
# For "equal" and "as good", which a wrong claim harms by one margin only: .07 over two looks.
LEVEL_EQUAL = 0.04
MIN_PAIRS = 2  # an sd of differences needs two
PRIOR_DF = 4  # how far the noise of the other arms may speak for a pair; see studies/LOG.md
# (from seeds, failures): so many more failures make an arm less reliable, one more where the other
# arm failed, too. Two of 6 against none would be said of .08 of pairs that both fail with
# probability .15, and a study looks several times.
MORE_FAILURES = ((8, 4), (0, 3))
# Seeds below which an earlier failure, on the explore seed, is one of them. In simulated studies
# whose runs all fail with probability .15, two of 3 against none made up half of the false help.
FEW_SEEDS = 4
MAX_MORE_SEEDS = 100


@dataclass(frozen=True)
class Noise:
    """What the other arms of a study say about the noise of one pair.

    Attributes:
        variance: Variance of one run around its arm's and its seed's effect.
        df: Its degrees of freedom; 0 where the other arms say nothing.
    """

    variance: float = 0.0
    df: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """Arm a against arm b over paired seeds; losses, so a negative difference favours a.

    Attributes:
        relation: What can be said of a: better, worse, equal (within the margin) or undecided.
        reason: What the relation rests on: ``"reliability"``, ``"quality"`` or ``"identical"``.
        as_good: Whether a is shown to be no worse than b by more than the margin.
        b_as_good: Whether b is shown to be no worse than a by more than the margin.
        difference: Mean of a - b over seeds where both finished; nan where there is none.
        low: Lower end of the interval of `difference`, at the level of better and worse.
        high: Upper end of it.
        n: Seeds that both arms ran.
        n_finished: Seeds that both finished.
        failed_a: Failed runs of a among the `n`.
        failed_b: Failed runs of b among the `n`.
        p_better: Share of seeds where a is better; failures are losses, ties count half.
        p_low: Lower end of its exact 95 % interval.
        p_high: Upper end of it.
        more_seeds: Further seeds that would decide it at this difference and noise; 0 where it is
            decided, None where that cannot be said or is above 100.
    """

    relation: Relation
    reason: str
    as_good: bool
    b_as_good: bool
    difference: float
    low: float
    high: float
    n: int
    n_finished: int
    failed_a: int
    failed_b: int
    p_better: float
    p_low: float
    p_high: float
    more_seeds: int | None


def compare(
    a: Sequence[float],
    b: Sequence[float],
    *,
    margin: float,
    level: float = LEVEL,
    noise: Noise | None = None,
    identical: bool = False,
    earlier: tuple[int, int] = (0, 0),
) -> Comparison:
    """Compare two arms by their losses over the same seeds.

    Reliability comes first: an arm with `MORE_FAILURES` more failures is worse.
    Else a t-interval of the paired differences decides: inside the margin the arms are equal,
    off zero one is better. A winner by quality must not have failed more often, and equals must
    not be two failures apart.

    Args:
        a: Losses of arm a, one a seed; inf where the run failed.
        b: Losses of arm b over the same seeds.
        margin: The smallest difference that matters, in loss units.
        level: One-sided error of the interval for better and worse; for equal it is `LEVEL_EQUAL`.
        noise: What the other arms say about the noise of one run.
        identical: Whether the runs are copies of each other, so that nothing is tested.
        earlier: Failures of a and of b on the explore seed; they count below `FEW_SEEDS` seeds.

    Raises:
        ValueError: If the arms have different numbers of seeds.

    >>> compare([1.0, 1.1, 0.9], [2.0, 2.1, 1.95], margin=0.1).relation
    'better'
    """
    if len(a) != len(b):
        message = f"a and b must hold one loss a seed each but got {len(a)} and {len(b)}"
        raise ValueError(message)
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    failed_a, failed_b = int(np.sum(~np.isfinite(x))), int(np.sum(~np.isfinite(y)))
    both = np.isfinite(x) & np.isfinite(y)
    pairs = x[both] - y[both]
    interval = _interval(pairs, level, noise or Noise())
    near = _interval(pairs, max(level, LEVEL_EQUAL), noise or Noise())
    failed = _Failures(failed_a, failed_b, *earlier, n=len(x))
    relation, reason = _relate(interval, near, margin, failed)
    if identical or (len(pairs) == len(x) >= MIN_PAIRS and not pairs.any()):
        relation, reason = "equal", "identical"
    decided = relation != "undecided"
    return Comparison(
        relation=relation,
        reason=reason,
        as_good=relation in ("better", "equal")
        or (near.high < margin and failed_a <= failed_b + 1 and reason == "quality"),
        b_as_good=relation in ("worse", "equal")
        or (near.low > -margin and failed_b <= failed_a + 1 and reason == "quality"),
        difference=interval.mean,
        low=interval.low,
        high=interval.high,
        n=len(x),
        n_finished=len(pairs),
        failed_a=failed_a,
        failed_b=failed_b,
        **_chance(x, y),
        more_seeds=0 if decided else _more_seeds(interval, margin, level),
    )


@dataclass(frozen=True)
class _Interval:
    mean: float
    low: float
    high: float
    n: int
    sd: float
    df: float


def _interval(pairs: Floats, level: float, noise: Noise) -> _Interval:
    """A t-interval whose variance leans on the other arms for at most `PRIOR_DF` of its df."""
    n = len(pairs)
    mean = float(pairs.mean()) if n else math.nan
    own_df = max(n - 1, 0)
    prior_df = min(noise.df, PRIOR_DF)
    df = own_df + prior_df
    if n < MIN_PAIRS or df <= 0:
        return _Interval(mean, -math.inf, math.inf, n, math.nan, df)
    squares = own_df * float(pairs.var(ddof=1)) + prior_df * 2 * noise.variance
    sd = math.sqrt(squares / df)
    half = _t(level, df) * sd / math.sqrt(n)
    return _Interval(mean, mean - half, mean + half, n, sd, df)


def _t(level: float, df: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(df, 1 - level))


@dataclass(frozen=True)
class _Failures:
    """Failed runs of two arms over `n` fresh seeds, and before them."""

    a: int
    b: int
    earlier_a: int
    earlier_b: int
    n: int

    @property
    def decide(self) -> int:
        """1 where a is less reliable, -1 where b is, else 0."""
        more = self.a - self.b
        if self.n < FEW_SEEDS:
            more += self.earlier_a - self.earlier_b
        need = next(number for seeds, number in MORE_FAILURES if self.n >= seeds)
        need += bool(self.a and self.b)
        return 0 if abs(more) < need else 1 if more > 0 else -1


def _relate(
    interval: _Interval, near: _Interval, margin: float, failed: _Failures
) -> tuple[Relation, str]:
    if failed.decide:
        return ("worse" if failed.decide > 0 else "better"), "reliability"
    if -margin < near.low and near.high < margin and abs(failed.a - failed.b) < 2:
        return "equal", "quality"
    if interval.high < 0 and failed.a <= failed.b:
        return "better", "quality"
    if interval.low > 0 and failed.b <= failed.a:
        return "worse", "quality"
    return "undecided", "quality"


def _chance(x: Floats, y: Floats) -> dict[str, float]:
    """P(a better) with its exact 95 % interval; ties, both failed included, count half."""
    n = len(x)
    if not n:
        return {"p_better": math.nan, "p_low": 0.0, "p_high": 1.0}
    wins = float(np.sum(x < y)) + 0.5 * float(np.sum(x == y))
    low, high = share_interval(wins, n)
    return {"p_better": wins / n, "p_low": low, "p_high": high}


def share_interval(k: float, n: int, level: float = 0.05) -> tuple[float, float]:
    """Exact (Clopper-Pearson) two-sided interval of a share `k` of `n`.

    >>> [round(end, 3) for end in share_interval(0, 6)]
    [0.0, 0.459]
    """
    from scipy.special import betaincinv

    low = 0.0 if k <= 0 else float(betaincinv(k, n - k + 1, level / 2))
    high = 1.0 if k >= n else float(betaincinv(k + 1, n - k, 1 - level / 2))
    return low, high


def _more_seeds(interval: _Interval, margin: float, level: float) -> int | None:
    """Seeds to add until the difference, or equality, would show if nothing else changed."""
    if interval.n < MIN_PAIRS or not math.isfinite(interval.sd):
        return None
    for more in range(1, MAX_MORE_SEEDS + 1):
        error = interval.sd / math.sqrt(interval.n + more)
        half = _t(level, interval.df + more) * error
        near = _t(max(level, LEVEL_EQUAL), interval.df + more) * error
        if half < abs(interval.mean) or abs(interval.mean) + near < margin:
            return more
    return None
