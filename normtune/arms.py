"""Which arms a study compares: the best max_norm explored, the rates tried, and their order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from normtune.surrogate import smoothed
from normtune.trials import Arm, Settings, Trial, explored, find, loss_of

if TYPE_CHECKING:
    from collections.abc import Sequence

SAME_VALUE = 1.1  # max_norms closer than 10 % give the same training within noise: one arm serves
# The suggestion serves as the best value unless another is ahead of it by so much of the sd of one
# run: fewer arms, and no winner picked by luck. In simulation 3 of 10 truly equal suggestions
# need no further comparison, and the regret of the search does not grow.
PREFER_SUGGESTION = 0.5
BRACKET = 2.0  # neighbours within this factor on both sides bracket the best rate (DESIGN 4)


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
    """The arms to confirm, from the runs of the explore seed."""
    current = None if settings.current is None else (settings.current, 1.0)
    return Arms(
        none=(math.inf, 1.0),
        best=(_best_max_norm(settings, trials), 1.0),
        suggestion=(settings.suggestion, 1.0),
        current=current if current and math.isfinite(current[0]) else None,
        lower=tuple((math.inf, factor) for factor in best_rates(settings, trials)[:2]),
    )


def ranked(settings: Settings, trials: Sequence[Trial]) -> tuple[float, ...]:
    """Explored max_norms whose run finished, best first; values within 10 % count once.

    They are ranked by the surrogate's mean, not by their one noisy value: in simulation that
    leaves .03 of choices further than one sd from the best after 10 runs, against .07.
    """
    runs = [t for t in explored(settings, trials) if t.state == "finished"]
    means = smoothed(settings, trials).means
    kept: list[float] = []
    for value in sorted((t.max_norm for t in runs), key=lambda c: (means[c], c)):
        if not any(_close(value, other) for other in kept):
            kept.append(value)
    return tuple(kept)


def clipping_leads(settings: Settings, trials: Sequence[Trial], *, by: float = 0.0) -> bool:
    """Whether a clipped value does better than no clipping on the explore seed.

    Args:
        settings: The study's settings.
        trials: All its trials.
        by: How far ahead it must be, in sd of one run as the surrogate sees it.
    """
    base = find(trials, (math.inf, 1.0), settings.seed)
    order = ranked(settings, trials)
    if base is None or not base.ended or not order:
        return False
    if math.isinf(loss_of(base, settings.direction)):
        return True
    found = smoothed(settings, trials)
    return found.means[math.inf] - found.means[order[0]] > by * found.noise


def _best_max_norm(settings: Settings, trials: Sequence[Trial]) -> float:
    order = ranked(settings, trials)
    best = order[0] if order else settings.suggestion
    return settings.suggestion if _suggestion_serves(settings, trials, best) else best


def _suggestion_serves(settings: Settings, trials: Sequence[Trial], best: float) -> bool:
    """Whether the explore seed cannot tell the suggestion from the best value."""
    if _close(best, settings.suggestion):
        return True
    run = find(explored(settings, trials), (settings.suggestion, 1.0), settings.seed)
    if run is None or run.state != "finished" or _fails_above(settings, trials):
        return False
    found = smoothed(settings, trials)
    behind = found.means[run.max_norm] - found.means[best]
    return behind < PREFER_SUGGESTION * found.noise


def _fails_above(settings: Settings, trials: Sequence[Trial]) -> bool:
    """Whether the next larger max_norm explored failed: then the suggestion was perhaps lucky."""
    base = find(trials, (math.inf, 1.0), settings.seed)
    above = [t for t in explored(settings, trials) if t.ended and t.max_norm > settings.suggestion]
    nearest = above[0] if above else base
    return nearest is not None and nearest.state in ("diverged", "stuck")


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
