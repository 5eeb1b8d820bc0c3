"""One training as the planner and the verdict see it, and the settings of a study."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

State = Literal["running", "finished", "diverged", "stuck", "crashed"]
Stage = Literal["explore", "lr", "confirm"]
Direction = Literal["minimize", "maximize"]
Arm = tuple[float, float]  # (max_norm, lr_factor)

COMMON = (1.0, 10.0)  # what people use without measuring; always a row of the table
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
        stage: What the run was planned for: explore, lr or confirm.
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
        min_seeds: The fewest fresh seeds of an arm that is compared; None takes the looks'.
        raised: How often the budget was raised after a verdict over fresh seeds.
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
    min_seeds: int | None = None
    raised: int = 0

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


def same_arm(a: Arm, b: Arm) -> bool:
    """Whether two arms are one, up to rounding in a storage."""
    return same(a[0], b[0]) and same(a[1], b[1])


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
