"""Arms compared over fresh paired seeds, and the verdict on clipping, learning rate, suggestion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from normtune.arms import Arms, choose_arms, rates, unbracketed
from normtune.trials import Arm, Settings, Trial, explored, find, loss, loss_of, same, settle

Relation = Literal["better", "worse", "equal", "undecided"]
Kind = Literal[1, 2, 3, 4, 5, 6, "none"]
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
NEAR_BEST_SD = 3.0  # arms further from the best have another noise (DESIGN 4, margin)
# (from seeds, failures): so many more failures make an arm less reliable, one more where the other
# arm failed, too. Two of 6 against none would be said of .08 of pairs that both fail with
# probability .15, and a study looks several times.
MORE_FAILURES = ((8, 4), (4, 3), (0, 2))
MAX_MORE_SEEDS = 100
TINY = 0.001  # a margin below this share of the loss gained is measurable but tiny
NOISY = 0.05  # a margin above it is too noisy to choose by
ENOUGH_RUNS = 24  # from here on every sentence can be reached (DESIGN 4, split)


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
) -> Comparison:
    """Compare two arms by their losses over the same seeds.

    Reliability comes first: an arm with two more failures (three where both failed) is worse.
    Else a t-interval of the paired differences decides: inside the margin the arms are equal,
    off zero one is better. A winner by quality must not have failed more often.

    Args:
        a: Losses of arm a, one a seed; inf where the run failed.
        b: Losses of arm b over the same seeds.
        margin: The smallest difference that matters, in loss units.
        level: One-sided error of the interval for better and worse; for equal it is `LEVEL_EQUAL`.
        noise: What the other arms say about the noise of one run.
        identical: Whether the runs are copies of each other, so that nothing is tested.

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
    relation, reason = _relate(interval, near, margin, (failed_a, failed_b), len(x))
    if identical:
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


def _relate(
    interval: _Interval, near: _Interval, margin: float, failed: tuple[int, int], n: int
) -> tuple[Relation, str]:
    failed_a, failed_b = failed
    need = next(more for seeds, more in MORE_FAILURES if n >= seeds)
    need += bool(failed_a and failed_b)
    if abs(failed_a - failed_b) >= need:
        return ("worse" if failed_a > failed_b else "better"), "reliability"
    if -margin < near.low and near.high < margin:
        return "equal", "quality"
    if interval.high < 0 and failed_a <= failed_b:
        return "better", "quality"
    if interval.low > 0 and failed_b <= failed_a:
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


# --- the arms of a study -----------------------------------------------------------------------


@dataclass(frozen=True)
class ArmRow:
    """One arm over the fresh seeds.

    Attributes:
        label: What the arm is, such as ``"no clipping"`` or ``"suggestion"``.
        max_norm: Its max_norm; inf is no clipping.
        lr_factor: Its learning-rate factor.
        mean: Mean validation value of finished runs, as the user's direction has it; else nan.
        sd: Their sample sd; nan below two.
        seeds: Fresh seeds that the arm ran.
        failed: Runs among them that diverged or never learned.
        failed_low: Lower end of the exact 95 % interval of the failure rate.
        failed_high: Upper end of it.
        free: Runs among them that were copied from the unclipped run.
        clip_share: Mean share of steps clipped; nan where unknown.
        delta: Mean loss minus that of no clipping over paired seeds (negative is better); nan for
            no clipping itself.
        delta_low: Lower end of its interval.
        delta_high: Upper end of it.
        p_better: P(better than no clipping).
    """

    label: str
    max_norm: float
    lr_factor: float
    mean: float
    sd: float
    seeds: int
    failed: int
    failed_low: float
    failed_high: float
    free: int
    clip_share: float
    delta: float
    delta_low: float
    delta_high: float
    p_better: float


@dataclass(frozen=True)
class Margin:
    """The smallest difference that matters.

    Attributes:
        loss: In loss units; nan where no seed speaks for it yet.
        percent: In percent of the best arm's mean value.
        sd: In sd of a single run.
        source: ``"user"`` or ``"one sd of a single run"``.
        note: ``"measurable but tiny"``, ``"too noisy to choose by"`` or empty.
    """

    loss: float
    percent: float
    sd: float
    source: str
    note: str


@dataclass(frozen=True)
class Verdict:
    """What a study can say.

    Attributes:
        kind: Which of the six sentences, 1 to 6, or ``"none"`` where no fresh seed was run.
        sentence: The sentence, with learning rate, seeds and what the seed varied.
        arms: One row an arm.
        suggestion_vs_none: helps, equal, hurts or undecided.
        suggestion_vs_best: as good, worse, undecided, or best (where it is the best found).
        suggestion_vs_current: better, equal, worse, undecided, or "" without a current value.
        best: The best clipped max_norm found.
        best_lr_factor: The best lower learning-rate factor without clipping; nan where none.
        margin: The margin in use.
        seeds: The fresh seeds in use.
        more_seeds: Further fresh seeds that would decide the sentence; None where unknown.
        comparisons: Every comparison behind the sentence, by its name such as ``"best vs none"``.
        notes: Further sentences: identical runs, notes on the margin, arms left out.
    """

    kind: Kind
    sentence: str
    arms: tuple[ArmRow, ...]
    suggestion_vs_none: str
    suggestion_vs_best: str
    suggestion_vs_current: str
    best: float
    best_lr_factor: float
    margin: Margin
    seeds: tuple[int, ...]
    more_seeds: int | None
    comparisons: Mapping[str, Comparison]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; non-finite numbers are strings."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


class Runs:
    """The fresh runs of a study, by arm and seed; only runs that ended.

    Args:
        settings: The study's settings.
        trials: All its trials.
    """

    def __init__(self, settings: Settings, trials: Sequence[Trial]) -> None:
        self.settings = settings
        self.all = settle(trials, settings.direction)
        self.fresh = [t for t in self.all if t.stage == "confirm" and t.ended]
        self.arms: Arms = choose_arms(settings, self.all)
        self._by_arm: dict[Arm, dict[int, Trial]] = {}

    def of(self, arm: Arm) -> dict[int, Trial]:
        """The fresh runs of an arm by seed."""
        if arm not in self._by_arm:
            self._by_arm[arm] = self._find(arm)
        return self._by_arm[arm]

    def _find(self, arm: Arm) -> dict[int, Trial]:
        runs = (t for t in self.fresh if same(t.max_norm, arm[0]) and same(t.lr_factor, arm[1]))
        return {t.seed: t for t in sorted(runs, key=lambda t: t.seed)}

    def losses(self, arm: Arm) -> dict[int, float]:
        """The losses of an arm by seed; inf where the run failed."""
        return {s: loss_of(t, self.settings.direction) for s, t in self.of(arm).items()}

    @cached_property
    def distinct(self) -> tuple[Arm, ...]:
        """The arms with fresh runs, in order of their first appearance in the verdict's table."""
        named = [self.arms.none, self.arms.best, self.arms.suggestion]
        named += [self.arms.current] if self.arms.current else []
        named += [*self.arms.lower, *(t.arm for t in self.fresh)]
        kept: list[Arm] = []
        for arm in named:
            if self.of(arm) and not any(_is(arm, other) for other in kept):
                kept.append(arm)
        return tuple(kept)

    def compare(self, a: Arm, b: Arm, *, margin: float) -> Comparison:
        """Arm a against arm b over the seeds that both ran."""
        x, y = self.losses(a), self.losses(b)
        seeds = [s for s in x if s in y]
        copies = bool(seeds) and all(self._copied(self.of(a)[s], self.of(b)[s]) for s in seeds)
        return compare(
            [x[s] for s in seeds],
            [y[s] for s in seeds],
            margin=margin,
            level=level_of(self.settings, len(seeds)),
            noise=self._noise(a, b),
            identical=copies or _is(a, b),
        )

    @staticmethod
    def _copied(a: Trial, b: Trial) -> bool:
        unclipped = (a.free or math.isinf(a.max_norm)) and (b.free or math.isinf(b.max_norm))
        return unclipped and same(a.lr_factor, b.lr_factor) and (a.free or b.free)

    def _noise(self, a: Arm, b: Arm) -> Noise:
        """The residual variance of the trained arms near the best, without this pair's own part.

        Where they say nothing, the variance of a single run stands in: with seeds that make arms
        go together it is too large, never too small.
        """
        arms = self.near_best
        with_pair = [*arms, *(arm for arm in (a, b) if not any(_is(arm, o) for o in arms))]
        squares, df = self._residual(with_pair)
        own_squares, own_df = self._residual([a, b])
        rest = df - own_df
        if rest <= 0:
            sd = self.single_run_sd(arms)
            df = sum(max(len(self._trained(arm)) - 1, 0) for arm in arms)
            return Noise(sd**2, df) if df else Noise()
        return Noise(max(squares - own_squares, 0.0) / rest, rest)

    def _residual(self, arms: Sequence[Arm]) -> tuple[float, int]:
        """Sum of squares around arm and seed effects, and its degrees of freedom."""
        cells = [
            (i, seed, value)
            for i, arm in enumerate(arms)
            for seed, value in self.losses(arm).items()
            if math.isfinite(value) and not self.of(arm)[seed].free
        ]
        if not cells:
            return 0.0, 0
        seeds = sorted({seed for _, seed, _ in cells})
        design = np.zeros((len(cells), len(arms) + len(seeds)))
        for row, (i, seed, _) in enumerate(cells):
            design[row, i] = design[row, len(arms) + seeds.index(seed)] = 1.0
        y = np.array([value for _, _, value in cells])
        fit, _, rank, _ = np.linalg.lstsq(design, y - y.mean(), rcond=None)
        return float(np.sum((y - y.mean() - design @ fit) ** 2)), len(cells) - int(rank)

    def single_run_sd(self, arms: Sequence[Arm] | None = None) -> float:
        """Unpaired sd of a single run, pooled over arms; nan below two runs of any arm."""
        squares, df = 0.0, 0
        for arm in self.near_best if arms is None else arms:
            values = self._trained(arm)
            if len(values) > 1:
                squares += (len(values) - 1) * float(np.var(values, ddof=1))
                df += len(values) - 1
        return math.sqrt(squares / df) if df else math.nan

    def _trained(self, arm: Arm) -> list[float]:
        runs = self.of(arm)
        return [v for s, v in self.losses(arm).items() if math.isfinite(v) and not runs[s].free]

    @cached_property
    def near_best(self) -> tuple[Arm, ...]:
        """The trained arms whose mean lies within 3 sd of the best one's."""
        means = {arm: float(np.mean(v)) for arm in self.distinct if (v := self._trained(arm))}
        if not means:
            return ()
        spreads = [float(np.std(v, ddof=1)) for arm in means if len(v := self._trained(arm)) > 1]
        sd = float(np.median(spreads)) if spreads else math.nan
        best = min(means.values())
        near = tuple(arm for arm, mean in means.items() if not mean - best > NEAR_BEST_SD * sd)
        pooled = self.single_run_sd(near)
        return tuple(arm for arm, mean in means.items() if not mean - best > NEAR_BEST_SD * pooled)


def _is(a: Arm, b: Arm) -> bool:
    return same(a[0], b[0]) and same(a[1], b[1])


def margin_of(runs: Runs) -> Margin:
    """The margin of a study: the user's, else one sd of a single run over the fresh seeds."""
    asked = runs.settings.margin
    sd = runs.single_run_sd()
    means = [abs(float(np.mean(runs._trained(arm)))) for arm in runs.near_best]
    scale = means[0] if means else math.nan
    if asked is None:
        value, source = sd, "one sd of a single run"
    else:
        value, source = _asked_margin(asked, scale), "user"
    return Margin(
        loss=value,
        percent=100 * value / scale if scale else math.nan,
        sd=value / sd if sd else math.nan,
        source=source,
        note=_margin_note(runs, value, scale),
    )


def _asked_margin(asked: float | str, scale: float) -> float:
    text = str(asked).strip()
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        message = f'margin must be a loss such as 0.01 or a share such as "1 %" but got {asked!r}'
        raise ValueError(message) from None
    if not 0 < value < math.inf:
        message = f"margin must be above 0 but got {asked!r}"
        raise ValueError(message)
    return value / 100 * scale if text.endswith("%") else value


def _margin_note(runs: Runs, margin: float, scale: float) -> str:
    direction = runs.settings.direction
    gains = [
        loss(t.first_value, direction) - loss(t.value, direction)
        for t in runs.fresh
        if t.state == "finished" and t.first_value is not None and t.value is not None
    ]
    gained = float(np.median(gains)) if gains else scale
    if not gained > 0 or math.isnan(margin):
        return ""
    if margin < TINY * gained:
        return "measurable but tiny"
    return "too noisy to choose by" if margin > NOISY * gained else ""


# --- the verdict -------------------------------------------------------------------------------


def level_of(settings: Settings, n: int) -> float:
    """The one-sided error of an interval over `n` seeds."""
    return FIRST_OF_THREE if settings.max_runs >= THREE_LOOKS_FROM and n <= 3 else LEVEL


def verdict(settings: Settings, trials: Sequence[Trial]) -> Verdict:
    """What the trials so far can say, by fresh paired seeds alone.

    Args:
        settings: The study's settings.
        trials: All its trials; running and crashed ones are left out.
    """
    runs = Runs(settings, trials)
    margin = margin_of(runs)
    found = comparisons(runs, margin.loss)
    kind = _kind(runs, found)
    relations = _suggestion(runs, found)
    return Verdict(
        kind=kind,
        sentence=_sentence(kind, runs, found, margin),
        arms=tuple(_row(runs, arm, margin.loss) for arm in runs.distinct),
        **relations,
        best=runs.arms.best[0],
        best_lr_factor=runs.arms.lower[0][1] if runs.arms.lower else math.nan,
        margin=margin,
        seeds=tuple(sorted({t.seed for t in runs.fresh})),
        more_seeds=_seeds_to_decide(kind, found),
        comparisons=found,
        notes=_notes(runs, found, margin),
    )


def comparisons(runs: Runs, margin: float) -> dict[str, Comparison]:
    """Every comparison that a verdict rests on, by name; those without a common seed are left out.

    Names: ``best vs none``, ``suggestion vs none``, ``suggestion vs best``,
    ``suggestion vs current``, and for the lower rates ``lower 1 vs best``, ``lower 1 vs none``,
    ``lower 2 vs ...``, ``clipped lower vs lower 1``.
    """
    arms = runs.arms
    pairs = {
        "best vs none": (arms.best, arms.none),
        "suggestion vs none": (arms.suggestion, arms.none),
        "suggestion vs best": (arms.suggestion, arms.best),
    }
    if arms.current:
        pairs["suggestion vs current"] = (arms.suggestion, arms.current)
    for i, lower in enumerate(arms.lower, start=1):
        pairs[f"lower {i} vs best"] = (lower, arms.best)
        pairs[f"lower {i} vs none"] = (lower, arms.none)
        pairs[f"clipped lower {i} vs lower {i}"] = ((arms.best[0], lower[1]), lower)
    found = {
        name: runs.compare(a, b, margin=margin)
        for name, (a, b) in pairs.items()
        if not _is(a, b) and runs.of(a) and runs.of(b)
    }
    return {name: c for name, c in found.items() if c.n}


def _kind(runs: Runs, found: Mapping[str, Comparison]) -> Kind:
    if not found:
        return "none"
    help_ = found.get("best vs none")
    helps = help_ is not None and help_.relation == "better"
    lower = _lower(runs, found)
    if any(vs_best.relation == "better" and (helps or beats_none) for vs_best, beats_none in lower):
        return 2
    if helps:
        if any(vs_best.as_good for vs_best, _ in lower):
            return 3
        return 1 if _lower_is_worse(runs, lower) else 4
    return 5 if help_ is not None and help_.b_as_good else 6


def _lower(runs: Runs, found: Mapping[str, Comparison]) -> list[tuple[Comparison, bool]]:
    """Each confirmed lower rate against the best clipped value, and whether it beats none."""
    names = range(1, len(runs.arms.lower) + 1)
    return [
        (
            found[f"lower {i} vs best"],
            f"lower {i} vs none" in found and found[f"lower {i} vs none"].relation == "better",
        )
        for i in names
        if f"lower {i} vs best" in found
    ]


def _lower_is_worse(runs: Runs, lower: Sequence[tuple[Comparison, bool]]) -> bool:
    """Whether both lower rates are confirmed as worse, and the best one has near neighbours."""
    bracketed = not unbracketed(rates(runs.settings, runs.all))
    return bracketed and len(lower) > 1 and all(c.relation == "worse" for c, _ in lower)


def _suggestion(runs: Runs, found: Mapping[str, Comparison]) -> dict[str, str]:
    vs_none = found.get("suggestion vs none")
    words = {"better": "helps", "worse": "hurts", "equal": "equal", "undecided": "undecided"}
    current = found.get("suggestion vs current")
    return {
        "suggestion_vs_none": words[vs_none.relation] if vs_none else "undecided",
        "suggestion_vs_best": _against_best(runs, found.get("suggestion vs best")),
        "suggestion_vs_current": _against_current(runs, current),
    }


def _against_best(runs: Runs, vs_best: Comparison | None) -> str:
    if _is(runs.arms.suggestion, runs.arms.best):
        return "best"
    if vs_best is None:
        return "undecided"
    if vs_best.relation == "worse":
        return "worse"
    return "as good" if vs_best.as_good else "undecided"


def _against_current(runs: Runs, current: Comparison | None) -> str:
    if runs.arms.current is None:
        return ""
    return current.relation if current else "undecided"


def _seeds_to_decide(kind: Kind, found: Mapping[str, Comparison]) -> int | None:
    """Further seeds until the sentence's open question is decided; 0 where none is open."""
    if kind not in (4, 6, "none"):
        return 0
    names = ["best vs none"] if kind == 6 else [n for n in found if n.endswith("vs best")]
    more = [found[name].more_seeds for name in names if name in found and name[0] != "s"]
    known = [m for m in more if m is not None]
    return max(known) if known and len(known) == len(more) else None


def _row(runs: Runs, arm: Arm, margin: float) -> ArmRow:
    trials = runs.of(arm).values()
    values = [t.value for t in trials if t.state == "finished" and t.value is not None]
    failed = sum(t.state != "finished" for t in trials)
    shares = [t.clip_share for t in trials if math.isfinite(t.clip_share)]
    low, high = share_interval(failed, len(trials))
    delta = runs.compare(arm, runs.arms.none, margin=margin)
    is_none = _is(arm, runs.arms.none)
    return ArmRow(
        label=_label(runs.arms, arm),
        max_norm=arm[0],
        lr_factor=arm[1],
        mean=float(np.mean(values)) if values else math.nan,
        sd=float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
        seeds=len(trials),
        failed=failed,
        failed_low=low,
        failed_high=high,
        free=sum(t.free for t in trials),
        clip_share=float(np.mean(shares)) if shares else math.nan,
        delta=math.nan if is_none else delta.difference,
        delta_low=math.nan if is_none else delta.low,
        delta_high=math.nan if is_none else delta.high,
        p_better=math.nan if is_none else delta.p_better,
    )


def _label(arms: Arms, arm: Arm) -> str:
    names = []
    if _is(arm, arms.none):
        names.append("no clipping")
    if _is(arm, arms.suggestion):
        names.append("suggestion")
    if _is(arm, arms.best):
        names.append("best found")
    if arms.current and _is(arm, arms.current):
        names.append("current")
    if names:
        return ", ".join(names)
    rate = f"at {_g(arm[1])}x lr"
    return f"no clipping {rate}" if math.isinf(arm[0]) else f"clipped {rate}"


# --- words -------------------------------------------------------------------------------------


def _g(x: float) -> str:
    return f"{x:.3g}"


def _sentence(kind: Kind, runs: Runs, found: Mapping[str, Comparison], margin: Margin) -> str:
    best = _g(runs.arms.best[0])
    within = f"within {_g(margin.loss)}"
    if kind == "none":
        return _lead(runs)
    rate = ", ".join(f"{_g(arm[1])}x" for arm in runs.arms.lower) or "none"
    where = "at learning rate " + _g(runs.settings.lr) if runs.settings.lr else "at this rate"
    gain = _gain_words(found.get("best vs none"))
    text = {
        1: f"Clipping gives a better model: max_norm {best} beats no clipping {where}{gain}, and "
        f"the best lower learning rates without clipping ({rate}) are worse",
        2: f"A lower learning rate is better: without clipping {_winner(found, runs)} beats "
        f"max_norm {best} {where}",
        3: "Clipping only makes up for a learning rate that is too high: max_norm "
        f"{best} beats no clipping {where}{gain}, but a lower rate without clipping "
        f"({_level_rate(found, runs)}) is as good {within}",
        4: f"Clipping helps {where}: max_norm {best} beats no clipping{gain}; whether a lower "
        f"learning rate does as well is open (tried: {_tried(runs)})",
        5: _equal_words(found.get("best vs none"), best, where, within),
        6: f"Undecided {where}: max_norm {best} against no clipping{gain}; "
        f"{_more_words(_seeds_to_decide(6, found))}",
    }[kind]
    return f"{text}. {_seeds_words(runs)}."


def _gain_words(c: Comparison | None) -> str:
    if c is None:
        return ""
    if c.reason == "reliability":
        return f" ({c.failed_b} of {c.n} runs failed without, {c.failed_a} with it)"
    if not math.isfinite(c.low):
        return ""
    return f" by {_g(-c.difference)} ({_g(-c.high)} to {_g(-c.low)})"


def _equal_words(c: Comparison | None, best: str, where: str, within: str) -> str:
    if c is None or c.reason == "identical":
        return f"Equal: max_norm {best} and no clipping are identical runs {where}"
    if c.relation == "equal":
        return f"Equal {within}: max_norm {best} and no clipping {where}"
    return (
        f"Equal {within} or worse: no clipping is at least as good as the best clipped value "
        f"found, max_norm {best}, {where}"
    )


def _winner(found: Mapping[str, Comparison], runs: Runs) -> str:
    return _first_rate(runs, [found.get(f"lower {i} vs best") for i in (1, 2)], "better")


def _level_rate(found: Mapping[str, Comparison], runs: Runs) -> str:
    return _first_rate(runs, [found.get(f"lower {i} vs best") for i in (1, 2)], "as good")


def _first_rate(runs: Runs, lower: Sequence[Comparison | None], word: str) -> str:
    for arm, c in zip(runs.arms.lower, lower, strict=False):
        if c is not None and (c.relation == "better" if word == "better" else c.as_good):
            return f"{_g(arm[1])}x the rate"
    return "a lower rate"


def _tried(runs: Runs) -> str:
    lower = [f for f in rates(runs.settings, runs.all) if f < 1]
    return ", ".join(f"{_g(f)}x" for f in lower) or "none"


def _more_words(more: int | None) -> str:
    if more is None:
        return (
            f"more than {MAX_MORE_SEEDS} further seeds would be needed, or noise is not known yet"
        )
    return f"about {more} more seed{'s' * (more != 1)} would decide"


def _seeds_words(runs: Runs) -> str:
    seeds = sorted({t.seed for t in runs.fresh})
    n = len(seeds)
    return f"{n} fresh seed{'s' * (n != 1)}, varying {runs.settings.varied}"


def _lead(runs: Runs) -> str:
    """The sentence of a study without fresh seeds."""
    settings = runs.settings
    base = find(runs.all, runs.arms.none, settings.seed)
    trained = sum(t.ended and not t.free for t in runs.all)
    best = [t for t in explored(settings, runs.all) if same(t.max_norm, runs.arms.best[0])]
    more = f"{max(ENOUGH_RUNS - trained, 1)} more runs would decide"
    if base is None or not best or not best[0].ended:
        return f"No verdict: {more}."
    a, b = (loss_of(t, settings.direction) for t in (best[0], base))
    leader = f"max_norm {_g(runs.arms.best[0])}" if a < b else "no clipping"
    return f"{leader} leads on one seed, no verdict: {more}."


def _notes(runs: Runs, found: Mapping[str, Comparison], margin: Margin) -> tuple[str, ...]:
    notes = [f"margin: {margin.note}"] if margin.note else []
    notes += [f"{name}: identical runs" for name, c in found.items() if c.reason == "identical"]
    for i, arm in enumerate(runs.arms.lower, start=1):
        c = found.get(f"clipped lower {i} vs lower {i}")
        if c is not None:
            words = {"better": "still helps", "worse": "hurts", "equal": "makes no difference"}
            said = words.get(c.relation, "is undecided")
            notes.append(f"clipping at {_g(arm[1])}x the learning rate {said} there")
    return tuple(notes)


def format_verdict(verdict: Verdict) -> str:
    """The verdict as text: the table of arms, the sentence, and what it says of the suggestion."""
    head = f"{'arm':<28}{'max_norm':>9}{'lr':>8}{'mean':>10}{'sd':>9}{'failed':>8}  to no clipping"
    lines = [head, *(_line(row) for row in verdict.arms)] if verdict.arms else []
    lines += ["", verdict.sentence] if lines else [verdict.sentence]
    if verdict.kind != "none":
        lines.append(_suggestion_words(verdict))
        lines.append(_margin_words(verdict.margin))
    lines += [f"  - {note}" for note in verdict.notes]
    return "\n".join(lines)


def _line(row: ArmRow) -> str:
    max_norm = "none" if math.isinf(row.max_norm) else _g(row.max_norm)
    failed = f"{row.failed} of {row.seeds}"
    change = ""
    if row.free == row.seeds:
        change = "identical runs (free)"
    elif math.isfinite(row.delta):
        change = f"{row.delta:+.3g}"
        if math.isfinite(row.delta_low):
            change += f" ({row.delta_low:+.3g} to {row.delta_high:+.3g})"
    return (
        f"{row.label:<28}{max_norm:>9}{_g(row.lr_factor) + 'x':>8}{_g(row.mean):>10}"
        f"{_g(row.sd):>9}{failed:>8}  {change}"
    ).rstrip()


def _suggestion_words(verdict: Verdict) -> str:
    if not any("suggestion" in row.label for row in verdict.arms):
        return "The suggestion got no fresh seeds within this budget: nothing is said of it."
    against = {
        "best": "it is the best found",
        "as good": "it is as good as the best found",
        "worse": "it is worse than the best found",
        "undecided": "against the best found it is undecided",
    }[verdict.suggestion_vs_best]
    none = {
        "helps": "helps against no clipping",
        "hurts": "hurts against no clipping",
        "equal": "equals no clipping within the margin",
        "undecided": "is undecided against no clipping",
    }[verdict.suggestion_vs_none]
    text = f"The suggestion {none}; {against}"
    if verdict.suggestion_vs_current:
        text += f"; against your current value it is {verdict.suggestion_vs_current}"
    return text + "."


def _margin_words(margin: Margin) -> str:
    if math.isnan(margin.loss):
        return "Margin: not known yet, no arm has two fresh seeds."
    parts = [f"{_g(margin.loss)} in loss", f"{_g(margin.percent)} %"]
    if math.isfinite(margin.sd):
        parts.append(f"{_g(margin.sd)} sd of a single run")
    return f"Margin: {', '.join(parts)} ({margin.source})."
