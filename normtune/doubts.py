"""What speaks against trusting a suggestion: a record and a max_norm to plain sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from normtune import statistics
from normtune.format import count, number, share
from normtune.records import SCHEDULE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from normtune.records import NormRecord
    from normtune.rules import Rule
    from normtune.statistics import ClipEffect, Floats, Interval

ADAPTIVE = (
    "adam", "rmsprop", "adagrad", "adadelta", "adafactor", "lamb", "lion", "shampoo", "soap",
    "rprop",
)  # fmt: skip
WITHOUT_EPS = ("lion", "rprop", "adafactor")
DIVERGED_SHARE = 0.05
LIMIT_SHARE = 0.5  # the Tuning Playbook calls clipping above this share extremely aggressive
DRIFT_RATIO = 1.5
WIDE = 2.0  # upper over lower end of an interval
SPIKE = 10.0  # times the median
LR_FELL = 0.9
# studies/README.md, "How long a warm-up": p90 of a shorter part of the schedule clips a share of
# the whole run that is off by more than 3x in half of the trainings; from half on in 1 of 7.
COVERED = 0.5
EPS_MARGIN = 100.0
TINY = 0.01  # torch's 1e-6 over max_norm
COARSE_ENOUGH = 0.003
FEWEST = 30  # finite norms below which nothing is suggested


@dataclass(frozen=True)
class Choice:
    """The max_norm that is doubted.

    Attributes:
        max_norm: The suggestion.
        rule: The rule that gave it.
        interval: Its 95 % interval, see `Rule.interval`.
        effective: Effective sample size for the rule's percentile.
        current: The max_norm in use today; nan where there is none.
        optimizer: Class name of the optimizer, several joined by "+"; may be empty.
        skipped_first: How many steps were left out before the record's first.
    """

    max_norm: float
    rule: Rule
    interval: Interval
    effective: float
    current: float = math.nan
    optimizer: str = ""
    skipped_first: int = 0


@dataclass(frozen=True)
class _Case:
    record: NormRecord
    choice: Choice

    @cached_property
    def norms(self) -> Floats:
        return self.record.finite

    @cached_property
    def ordered(self) -> Floats:
        return statistics.in_order(self.norms)

    @cached_property
    def effect(self) -> ClipEffect:
        return statistics.clip_effect(self.norms, self.choice.max_norm)

    @cached_property
    def median(self) -> float:
        return float(np.percentile(self.ordered, 50))

    @property
    def value(self) -> str:
        return number(self.choice.max_norm, 8)

    @property
    def label(self) -> str:
        return self.choice.rule.label

    def optimizer_is(self, *words: str) -> bool:
        return any(word in self.choice.optimizer.lower() for word in words)


def doubts_about(record: NormRecord, choice: Choice) -> tuple[str, ...]:
    """The doubts about a suggestion, the most serious first.

    Args:
        record: The norms that it comes from, at least 2 of them finite.
        choice: The suggestion.

    Returns:
        Sentences without full stop. The last one is never a doubt of its own: it says what kind
        of threshold this is and what it cannot do.
    """
    case = _Case(record, choice)
    return (*(text for find in _DOUBTS for text in find(case)), _closing(case))


def is_adaptive(optimizer: str) -> bool:
    """Whether the optimizer divides the gradient's scale out again, as Adam does.

    >>> is_adaptive("AdamW"), is_adaptive("SGD")
    (True, False)
    """
    return any(word in optimizer.lower() for word in ADAPTIVE)


def _scale_free(case: _Case) -> Iterator[str]:
    if case.optimizer_is("muon"):
        yield (
            "Muon normalises every update by itself: clipping the total norm hardly changes its "
            "steps, so leave it off for these parameters"
        )
    if case.optimizer_is("lbfgs"):
        yield (
            "LBFGS compares gradients of one step with each other: clipping breaks that and is "
            "unusual; the norms here are those of each step's first evaluation"
        )


def _nonfinite(case: _Case) -> Iterator[str]:
    taken = case.record.norms[~case.record.skipped]
    bad = ~np.isfinite(taken)
    if not bad.any():
        return
    n, part = int(bad.sum()), float(bad.mean())
    if part > DIVERGED_SHARE or bad[-1]:
        last = ", the last one too" if bad[-1] else ""
        yield (
            f"{count(n, 'step')} of {len(taken)} ({share(part)}) had a non-finite norm{last}: this "
            "run diverged, and norms of a run that diverges say little. Lower the learning rate "
            "first (0.3x) and record again"
        )
    else:
        were = "was" if n == 1 else "were"
        yield (
            f"{count(n, 'step')} of {len(taken)} had a non-finite norm and {were} left out; no "
            "max_norm mends such a step"
        )


def _findings(case: _Case) -> Iterator[str]:
    for finding in case.record.findings:
        times = f" ({finding.count} times)" if finding.count > 1 else ""
        yield f"{finding.text.rstrip('.')}{times}"


def _drifting(case: _Case) -> Iterator[str]:
    ratio = statistics.drift(case.norms).ratio
    if 1 / DRIFT_RATIO < ratio < DRIFT_RATIO:
        yield from _burn_in(case) or _uneven(case)
        return
    verb = "grew" if ratio > 1 else "fell"
    factor = max(ratio, 1 / ratio) if ratio else math.inf
    times = f"{number(factor, 2)}x" if math.isfinite(factor) else "to or from zero"
    yield (
        f"norms {verb} {times} from the first to the second half: as recorded now, {case.value} "
        f"would clip {share(case.effect.second_half)} of later steps. {_remedy(case)}"
    )


def _short_of_schedule(case: _Case) -> Iterator[str]:
    schedule = _fact(case.record, SCHEDULE)
    if math.isnan(schedule):
        schedule = _fact(case.record, SCHEDULE, own=True)
    last = int(case.record.steps[-1])
    if last < COVERED * schedule < math.inf:
        yield (
            f"the record ends at step {last} of {number(schedule, 8)}: in half of the shipped "
            "trainings a warm-up below half of the schedule misjudged the share of steps that is "
            f"clipped in the end by more than 3x. Record {math.ceil(COVERED * schedule)} steps"
        )


def _burn_in(case: _Case) -> list[str]:
    """Large norms that come at the very start, where a warm-up of the run explains them."""
    start = len(case.norms) // 10
    clipped = statistics.coefficients(case.norms, case.choice.max_norm) < 1
    early, total = int(clipped[:start].sum()), int(clipped.sum())
    if len(case.norms) - start < FEWEST or early < 5 or early <= total / 2:
        return []
    later = case.choice.rule.function(case.norms[start:])
    text = (
        f"the start sets this value: {early} of the {total} steps that {case.value} clips lie in "
        f"the first tenth. Without it {case.label} is {number(later)}: "
        f"--skip {_step_of(case, start)}"
    )
    return [text]


def _uneven(case: _Case) -> list[str]:
    first, second = case.effect.first_half, case.effect.second_half
    part = case.effect.share
    error = math.sqrt(part * (1 - part) / (len(case.norms) / 4))
    if max(first, second) <= 3 * min(first, second) or abs(first - second) <= 3 * error:
        return []
    where = "first" if first > second else "second"
    text = (
        f"large norms come mostly in the {where} half: as recorded now, {case.value} would clip "
        f"{share(second)} of later steps. {_remedy(case)}"
    )
    return [text]


def _remedy(case: _Case) -> str:
    half = len(case.norms) // 2
    enough = len(case.norms) - half >= FEWEST
    return f"Record longer, or --skip {_step_of(case, half)}" if enough else "Record longer"


def _step_of(case: _Case, i: int) -> int:
    """How many steps of the whole record lie before the i-th norm."""
    used = np.isfinite(case.record.norms) & ~case.record.skipped
    return case.choice.skipped_first + int(np.flatnonzero(used)[i])


def _too_few(case: _Case) -> Iterator[str]:
    low, high = case.choice.interval
    n, effective = len(case.norms), case.choice.effective
    if math.isnan(low) or case.choice.rule.percentile == 100:
        return
    worth = f", worth about {number(effective, 2)} independent ones," if effective < n / 2 else ""
    start = f"{count(n, 'norm')}{worth} are too few for {case.label}"
    if not math.isfinite(high):
        needed = statistics.size_with_upper_bound(case.choice.rule.percentile) * n / effective
        more = f"; record about {_round_up(needed)} steps" if math.isfinite(needed) else ""
        yield f"{start}: its interval has no upper bound{more}"
    elif high > WIDE * max(low, 1e-300):
        yield (
            f"{start}: it lies anywhere in {number(low)} to {number(high)}; record about "
            f"{_round_up(4 * n)} steps"
        )


def _round_up(steps: float) -> int:
    size = 10.0 ** max(0, math.floor(math.log10(steps)) - 1)
    return int(math.ceil(steps / size) * size)


def _thin_source(case: _Case) -> Iterator[str]:
    origin = case.record.origin
    if origin.value == "mean of window":
        yield (
            "each value is a mean over a window of steps: single norms spread wider than these, so "
            "the shares are rough and spikes are understated"
        )
    elif origin.value == "last of window":
        yield (
            "only the last step of each logging window is in this log: shares hold for such a "
            "sample, but spikes between the logged steps are missing"
        )
    elif origin.value == "unknown":
        yield "the log does not say whether a value is one step or a mean over several"
    if origin.clip_side == "unknown":
        yield (
            "the log does not say whether its norms were taken before clipping; if after, this "
            "suggestion means nothing"
        )


def _gappy(case: _Case) -> Iterator[str]:
    steps = case.record.steps
    if case.record.origin.value != "each step" or len(steps) < 3:
        return
    gap = float(np.median(np.diff(steps)))
    if gap >= 2:
        yield f"only every {number(gap)}th step was logged: spikes between them are missing"


def _spikes(case: _Case) -> Iterator[str]:
    median, chosen = case.median, case.choice.max_norm
    if median <= 0:
        return
    largest = float(case.ordered[-1])
    spikes = int((case.norms > SPIKE * median).sum())
    top = case.ordered[-max(1, len(case.norms) // 100) :]
    if spikes and float((top / largest).sum()) > 0.5 * float((case.norms / largest).sum()):
        yield (
            f"spikes dominate: {count(spikes, 'step')} of {len(case.norms)} above 10x the median "
            f"({number(median)}), the largest {number(largest)}; rules that use the mean follow "
            "them"
        )
    if chosen > SPIKE / 2 * median:
        yield (
            f"{case.value} is {number(chosen / median, 2)}x the median: a typical step could grow "
            f"so much before it is clipped. 2 x median ({number(2 * median)}) is a tighter guard"
        )


def _normalises(case: _Case) -> Iterator[str]:
    smallest = float(case.norms.min())
    if case.effect.share < 1 or not case.optimizer_is("sgd"):
        return
    lr = _last_lr(case.record)
    step = f" = {number(lr * case.choice.max_norm)}" if math.isfinite(lr) else ""
    yield (
        f"{case.value} lies below the smallest norm ({number(smallest)}): every step is clipped, "
        f"and SGD becomes normalised SGD with step length lr x max_norm{step}"
    )


def _aggressive(case: _Case) -> Iterator[str]:
    if LIMIT_SHARE < case.effect.share < 1 and not is_adaptive(case.choice.optimizer):
        yield (
            f"{case.value} clips {share(case.effect.share)} of the steps; above 50 % the Tuning "
            "Playbook advises a lower learning rate instead"
        )


def _belted(case: _Case) -> Iterator[str]:
    n = int(case.record.belted.sum())
    if n:
        yield (
            f"{count(n, 'step')} of the warm-up exploded and were held by the belt of clip_after: "
            "the norms after them are not those of an unclipped run"
        )


def _clipped_meanwhile(case: _Case) -> Iterator[str]:
    limits = case.record.max_norm
    known = np.isfinite(limits) & np.isfinite(case.record.norms) & ~case.record.skipped
    if not known.any():
        return
    part = float((case.record.norms[known] > limits[known]).sum()) / len(case.norms)
    if part > LIMIT_SHARE:
        yield (
            f"the recorded run was itself clipped in {share(part)} of its steps: the norms are "
            "true, but they are those of a run so clipped. max_norm=inf records one without"
        )


def _rate_fell(case: _Case) -> Iterator[str]:
    known = case.record.lr[np.isfinite(case.record.lr)]
    if len(known) and known[-1] < LR_FELL * known.max():
        yield (
            f"the learning rate fell from {number(float(known.max()))} to "
            f"{number(float(known[-1]))} while recording: the norms mix both"
        )


def _tiny(case: _Case) -> Iterator[str]:
    if TINY * case.choice.max_norm < statistics.TORCH_EPS:
        asked = float((case.norms > case.choice.max_norm).mean())
        yield (
            f"torch adds 1e-6 to the norm, which is much beside {case.value}: it would clip "
            f"{share(case.effect.share)} of the steps instead of {share(asked)}; scale the loss up"
        )


def _eps_floor(case: _Case) -> Iterator[str]:
    eps = _fact(case.record, "eps")
    scalars = _fact(case.record, "parameters")
    adaptive = is_adaptive(case.choice.optimizer) and not case.optimizer_is(*WITHOUT_EPS)
    if not (adaptive and eps > 0 and scalars > 0):
        return
    typical = case.choice.max_norm / math.sqrt(scalars)
    if typical < EPS_MARGIN * eps:
        yield (
            f"at {case.value} a gradient entry is about {number(typical, 2)}, near eps = "
            f"{number(eps)}: eps then shortens the steps of {case.choice.optimizer}; lower eps "
            "or raise max_norm"
        )


def _coarse(case: _Case) -> Iterator[str]:
    step = statistics.coarseness(case.ordered)
    if step > COARSE_ENOUGH:
        levels = len(statistics.distinct(case.ordered))
        yield (
            f"the log holds only {count(levels, 'distinct value')} (steps of about "
            f"{number(100 * step, 2)} %): norms in bf16 or printed with few digits; the suggestion "
            "is no finer"
        )


def _zeros(case: _Case) -> Iterator[str]:
    n = int((case.norms == 0).sum())
    if n:
        yield (
            f"{count(n, 'step')} of {len(case.norms)} had a norm of exactly 0: nothing was "
            "trained there, and they lower every percentile"
        )


def _skipped(case: _Case) -> Iterator[str]:
    n = int(case.record.skipped.sum())
    if n:
        yield (
            f"{count(n, 'step')} of {len(case.record)} ({share(n / len(case.record))}) were "
            "skipped by the GradScaler and left out"
        )


def _adaptive_note(case: _Case) -> Iterator[str]:
    if is_adaptive(case.choice.optimizer):
        yield (
            f"under {case.choice.optimizer} the step itself hardly shrinks (it divides the scale "
            'out again): "gradient kept" is how much a step counts in the running averages'
        )


def _current(case: _Case) -> Iterator[str]:
    current = case.choice.current
    if not math.isfinite(current):
        return
    part = statistics.clip_share(case.norms, current)
    text = number(current, 8) if current != 1 else "1.0"
    if part >= LIMIT_SHARE:
        yield (
            f"your current {text} clips {share(part)} of your steps: it acts as a step-size "
            "limit, not as a guard"
        )
    elif part == 0:
        yield f"your current {text} clips none of these steps: the same as no clipping here"


def _closing(case: _Case) -> str:
    limit = case.effect.share >= LIMIT_SHARE
    kind = (
        f"is a step-size limit, not a guard: it scales {share(case.effect.share)} of the steps"
        if limit
        else "is a guard: it acts on spikes"
    )
    return (
        f"{case.label} {kind}. It won't rescue a learning rate that is too high; if norms grow or "
        "explode, lower the learning rate first (0.3x) and record again"
    )


def _last_lr(record: NormRecord) -> float:
    known = record.lr[np.isfinite(record.lr)]
    return float(known[-1]) if len(known) else _fact(record, "lr_initial")


def _fact(record: NormRecord, key: str, *, own: bool = False) -> float:
    """A number of the header, or of the user's `own` facts in it; nan where there is none."""
    facts: Any = record.metadata.get("metadata") if own else record.metadata
    value: Any = facts.get(key) if isinstance(facts, Mapping) else None
    return float(value) if isinstance(value, int | float) else math.nan


_DOUBTS: tuple[Callable[[_Case], Iterator[str]], ...] = (
    _scale_free,
    _nonfinite,
    _findings,
    _drifting,
    _short_of_schedule,
    _too_few,
    _thin_source,
    _gappy,
    _spikes,
    _normalises,
    _aggressive,
    _belted,
    _clipped_meanwhile,
    _rate_fell,
    _tiny,
    _eps_floor,
    _coarse,
    _zeros,
    _skipped,
    _adaptive_note,
    _current,
)
