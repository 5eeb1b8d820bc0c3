"""The fresh runs of a study by arm and seed, what they say of noise, and the margin."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from normtune.arms import Arms, choose_arms
from normtune.paired import (
    FIRST_OF_THREE,
    LEVEL,
    THREE_LOOKS_FROM,
    Comparison,
    Noise,
    compare,
)
from normtune.trials import Arm, Settings, Trial, find, loss, loss_of, same, same_arm, settle

if TYPE_CHECKING:
    from collections.abc import Sequence

NEAR_BEST_SD = 3.0  # arms further from the best have another noise (DESIGN 4, margin)
TINY = 0.001  # a margin below this share of the loss gained is measurable but tiny
NOISY = 0.05  # a margin above it is too noisy to choose by


class Runs:
    """The fresh runs of a study, by arm and seed; only runs that ended.

    Args:
        settings: The study's settings.
        trials: All its trials.
        arms: Which arms are compared; those that exploring leaves over without it.
    """

    def __init__(
        self, settings: Settings, trials: Sequence[Trial], arms: Arms | None = None
    ) -> None:
        self.settings = settings
        self.all = settle(trials, settings.direction)
        self.fresh = [t for t in self.all if t.stage == "confirm" and t.ended]
        self.arms: Arms = arms or choose_arms(settings, self.all)
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
            if self.of(arm) and not any(same_arm(arm, other) for other in kept):
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
            identical=copies or same_arm(a, b),
            earlier=(self._failed_before(a), self._failed_before(b)),
        )

    def _failed_before(self, arm: Arm) -> int:
        """Whether an arm failed on the explore seed."""
        run = find(self.all, arm, self.settings.seed)
        return int(run is not None and run.ended and run.state != "finished")

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
        with_pair = [*arms, *(arm for arm in (a, b) if not any(same_arm(arm, o) for o in arms))]
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


def level_of(settings: Settings, n: int) -> float:
    """The one-sided error of an interval over `n` seeds.

    Who raises the budget of an undecided study looks once more than planned, so that every time
    halves what may be spent. In simulation a budget that grows from 24 to 60 in six steps until
    something is said says it of .08 of placebo studies without this, and of .035 with it.
    """
    level = FIRST_OF_THREE if settings.max_runs >= THREE_LOOKS_FROM and n <= 3 else LEVEL
    return float(level / 2**settings.raised)


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
