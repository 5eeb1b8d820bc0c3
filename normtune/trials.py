"""One training as the planner and the verdict see it, and the settings of a study."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

State = Literal["running", "finished", "diverged", "stuck", "crashed"]
Stage = Literal["explore", "lr", "race", "confirm"]
Direction = Literal["minimize", "maximize"]
Arm = tuple[float, float]  # (max_norm, lr_factor)

LEARNED = 0.05  # a run no better than 5 % below its first report never learned (DESIGN 4)
# ... unless the study's best run gained little more than it: then the first report came from a
# model that was trained already, as in fine-tuning, and 5 % says nothing.
STUCK_SHARE = 0.25


@dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        max_norm: The max_norm of the run; inf is no clipping.
        lr_factor: What the study's learning rate was multiplied by.
        seed: The seed of the run; `Settings.seed` explores, the seeds after it confirm.
        state: How the run stands. Diverged and stuck runs are results, a crashed one is not.
        stage: What the run was planned for: explore, lr, race or confirm.
        value: Its validation value as the user's direction has it; None unless finished or stuck.
        free: Whether the run was copied from the unclipped run of its seed, not trained.
        largest_norm: Largest recorded norm, inf where one was not finite; nan where unknown.
        smallest_norm: Smallest recorded norm; nan where unknown.
        clip_share: Share of its steps with a coefficient below 1; nan where unknown.
        kept: Mean of min(1, max_norm / norm) over its steps; nan where unknown.
        seconds: How long it took; nan where unknown.
        first_value: Its first reported validation value; None where there was only one.
        fraction: The share of the whole schedule that it trained.
    """

    max_norm: float
    lr_factor: float
    seed: int
    state: State
    stage: str
    value: float | None = None
    free: bool = False
    largest_norm: float = math.nan
    smallest_norm: float = math.nan
    clip_share: float = math.nan
    kept: float = math.nan
    seconds: float = math.nan
    first_value: float | None = None
    fraction: float = 1.0

    @property
    def arm(self) -> Arm:
        """What is compared over seeds: (max_norm, lr_factor)."""
        return (self.max_norm, self.lr_factor)

    @property
    def ended(self) -> bool:
        """Whether the run is a result: finished, diverged or stuck."""
        return self.state in ("finished", "diverged", "stuck")


@dataclass(frozen=True)
class Settings:
    """What a search is fixed to when its study starts.

    Attributes:
        max_runs: How many trainings may be spent; free runs and crashes are not counted.
        suggestion: The suggested max_norm.
        low: Lower end of the searched range of max_norm.
        high: Upper end of the searched range of max_norm.
        current: The max_norm of the user's own loop; None where it does not clip.
        lr_runs: Trainings for the learning-rate search; None takes the planner's split.
        explore_runs: Trainings that search on one seed; None takes the planner's split.
        margin: The smallest difference that matters: loss units, or a string such as ``"1 %"`` of
            the loss; None takes one sd of a single run.
        direction: Whether the validation value is minimized or maximized.
        seed: The explore seed.
        adaptive: Whether the optimizer is Adam-like, so that clipping hardly shortens its steps.
        half_precision: Whether norms are kept in half precision, so that free runs need 1 % more.
        reuse: Whether runs whose every coefficient is 1.0 are copied instead of trained.
        explore_fraction: The share of the schedule that explore and learning-rate runs train.
        lr: The learning rate at factor 1.0, for the sentences; None where unknown.
        varied: What another seed varies, for the sentences.
    """

    max_runs: int
    suggestion: float
    low: float
    high: float
    current: float | None = None
    lr_runs: int | None = None
    explore_runs: int | None = None
    margin: float | str | None = None
    direction: Direction = "minimize"
    seed: int = 0
    adaptive: bool = False
    half_precision: bool = False
    reuse: bool = True
    explore_fraction: float = 1.0
    lr: float | None = None
    varied: str = "all that the training draws from its seed"

    def __post_init__(self) -> None:
        """Refuse settings that no search can start from.

        Raises:
            ValueError: If a number is out of its range.
        """
        if self.max_runs < 4:
            message = f"max_runs must be at least 4 but got {self.max_runs}"
            raise ValueError(message)
        if not 0 < self.low < self.high < math.inf:
            message = f"low and high must be 0 < low < high but got {self.low} and {self.high}"
            raise ValueError(message)
        for name in ("suggestion", "current"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                message = f"{name} must be above 0 but got {value}"
                raise ValueError(message)


def state_of(value: float | None, first_value: float | None, direction: Direction) -> State:
    """How a training that came to its end is to be counted.

    Args:
        value: The validation value that counts; None where none was reported.
        first_value: The first validation value that the run reported; None where it is the only.
        direction: Whether the value is minimized or maximized.

    Returns:
        ``"diverged"`` without a finite value, ``"stuck"`` where the value is no better than 5 %
        below the first report (above it for maximize), else ``"finished"``.
    """
    if value is None or not math.isfinite(value):
        return "diverged"
    if first_value is None or not math.isfinite(first_value):
        return "finished"
    better_by = loss(first_value, direction) - loss(value, direction)
    return "finished" if better_by > LEARNED * abs(first_value) else "stuck"


def loss(value: float, direction: Direction) -> float:
    """`value` as a loss: lower is better."""
    return value if direction == "minimize" else -value


def loss_of(trial: Trial, direction: Direction) -> float:
    """The loss of an ended run; inf where it failed."""
    if trial.state != "finished" or trial.value is None:
        return math.inf
    return loss(trial.value, direction)


def settle(trials: Iterable[Trial], direction: Direction) -> tuple[Trial, ...]:
    """The trials without crashes, and with stuck runs judged by what the study's best run gained.

    A stuck run counts as finished where it gained a quarter of the most that any run gained.
    """
    kept = [t for t in trials if t.state != "crashed"]
    best = max((_gain(t, direction) for t in kept if t.ended), default=0.0)
    return tuple(
        replace(t, state="finished")
        if t.state == "stuck" and best > 0 and _gain(t, direction) >= STUCK_SHARE * best
        else t
        for t in kept
    )


def _gain(trial: Trial, direction: Direction) -> float:
    if trial.value is None or trial.first_value is None:
        return -math.inf
    gain = loss(trial.first_value, direction) - loss(trial.value, direction)
    return gain if math.isfinite(gain) else -math.inf


def same(a: float, b: float) -> bool:
    """Whether two max_norms or learning-rate factors are one, up to rounding in a storage."""
    return a == b or math.isclose(a, b, rel_tol=1e-9)


def find(trials: Iterable[Trial], arm: Arm, seed: int) -> Trial | None:
    """The trial of an arm and a seed; None where there is none."""
    return next(
        (
            t
            for t in trials
            if t.seed == seed and same(t.max_norm, arm[0]) and same(t.lr_factor, arm[1])
        ),
        None,
    )


def explored(settings: Settings, trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Trained clipped runs of the explore seed at the study's own learning rate, by max_norm."""
    runs = (
        t
        for t in trials
        if t.seed == settings.seed
        and t.stage == "explore"
        and t.lr_factor == 1.0
        and math.isfinite(t.max_norm)
        and not t.free
    )
    return tuple(sorted(runs, key=lambda t: t.max_norm))


SAME_VALUE = 1.1  # max_norms closer than 10 % give the same training within noise: one arm serves


@dataclass(frozen=True)
class Arms:
    """Which arms a study compares over fresh seeds.

    Attributes:
        none: No clipping at the study's own learning rate.
        best: The best clipped max_norm explored; may be the suggestion itself.
        suggestion: The suggested max_norm.
        current: The max_norm of the user's own loop; None where it does not clip.
        lower: The best two lower learning rates without clipping, best first.
    """

    none: Arm
    best: Arm
    suggestion: Arm
    current: Arm | None
    lower: tuple[Arm, ...]


def choose_arms(settings: Settings, trials: Sequence[Trial]) -> Arms:
    """The arms to confirm, from the runs of the explore seed (and the race)."""
    current = None if settings.current is None else (settings.current, 1.0)
    return Arms(
        none=(math.inf, 1.0),
        best=(_best_max_norm(settings, trials), 1.0),
        suggestion=(settings.suggestion, 1.0),
        current=current if current and math.isfinite(current[0]) else None,
        lower=tuple((math.inf, factor) for factor in best_rates(settings, trials)[:2]),
    )


def ranked(settings: Settings, trials: Sequence[Trial]) -> tuple[float, ...]:
    """Explored max_norms whose run finished, best first; values within 10 % count once."""
    runs = [t for t in explored(settings, trials) if t.state == "finished"]
    runs.sort(key=lambda t: loss_of(t, settings.direction))
    kept: list[float] = []
    for value in (t.max_norm for t in runs):
        if not any(_close(value, other) for other in kept):
            kept.append(value)
    return tuple(kept)


def _best_max_norm(settings: Settings, trials: Sequence[Trial]) -> float:
    order = ranked(settings, trials)
    best = _winner_of_race(settings, trials, order) or (order[0] if order else settings.suggestion)
    return settings.suggestion if _close(best, settings.suggestion) else best


def _winner_of_race(
    settings: Settings, trials: Sequence[Trial], order: Sequence[float]
) -> float | None:
    """The better of the raced values by its mean over the explore and the race seed."""
    means = {}
    for t in trials:
        if t.stage == "race" and t.ended:
            first = find(explored(settings, trials), t.arm, settings.seed)
            if first is not None:
                runs = (first, t)
                means[t.max_norm] = sum(loss_of(r, settings.direction) for r in runs) / 2
    finite = {c: mean for c, mean in means.items() if math.isfinite(mean)}
    return min(finite, key=lambda c: (finite[c], list(order).index(c))) if finite else None


def _close(a: float, b: float) -> bool:
    return max(a, b) <= SAME_VALUE * min(a, b)


def rates(settings: Settings, trials: Sequence[Trial]) -> dict[float, float]:
    """Unclipped loss of the explore seed by learning-rate factor; inf where the run failed."""
    return {
        t.lr_factor: loss_of(t, settings.direction)
        for t in sorted(trials, key=lambda t: -t.lr_factor)
        if t.stage in ("explore", "lr")
        and t.seed == settings.seed
        and t.ended
        and math.isinf(t.max_norm)
    }


def best_rates(settings: Settings, trials: Sequence[Trial]) -> tuple[float, ...]:
    """Lower learning-rate factors tried without clipping, best first, failed ones last."""
    tried = rates(settings, trials)
    return tuple(sorted((f for f in tried if f < 1), key=lambda f: (tried[f], -f)))


BRACKET = 2.0  # neighbours within this factor on both sides bracket the best rate (DESIGN 4)


def unbracketed(tried: dict[float, float]) -> tuple[float, ...]:
    """Learning-rate factors still to try before the best unclipped rate is bracketed.

    Args:
        tried: Loss by factor, inf for failed runs; it holds factor 1.0. Above 1.0 nothing is
            asked: whether a *lower* rate serves is the question.

    >>> unbracketed({1.0: 3.0, 1 / 3: 1.0, 0.2: 2.0})
    (0.577...,)
    """
    factors = sorted(tried)
    best = min(factors, key=lambda f: (tried[f], f))
    i = factors.index(best)
    above = factors[i + 1] if i + 1 < len(factors) else None
    below = factors[i - 1] if i else None
    wanted = []
    if above is not None and above / best > BRACKET * (1 + 1e-9):
        wanted.append(math.sqrt(above * best))
    if below is None:
        wanted.append(best / 3)
    elif best / below > BRACKET * (1 + 1e-9):
        wanted.append(math.sqrt(below * best))
    return tuple(wanted)
