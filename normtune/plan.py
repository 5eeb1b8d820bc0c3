"""Pure planning: the trials so far -> the next runs, with the reasons in words."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from normtune.arms import choose_arms, clipping_leads, rates, unbracketed
from normtune.comparison import Verdict, verdict
from normtune.fresh import Runs
from normtune.surrogate import propose
from normtune.trials import (
    COMMON,
    Arm,
    Direction,
    Settings,
    Stage,
    State,
    Trial,
    find,
    same,
    same_arm,
    settle,
    state_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "Direction",
    "Plan",
    "Planned",
    "Settings",
    "Split",
    "Stage",
    "State",
    "Trial",
    "describe_plan",
    "free_from",
    "next_runs",
    "split",
    "state_of",
]

# Clipped values before the surrogate proposes. In simulation the best was found within one sd after
# 12 runs in .97, .995, .99 and .995 of studies for 3, 4, 5 and 6 of them.
FIRST_VALUES = 4
FIRST_FACTORS = (1 / 3, 1 / 10)  # rates that users step through; the rest is bracketing
# sd of one run, as the surrogate sees it. A smaller lead waits for fresh seeds: in simulation 3 of
# 4 studies in which nothing differs stay below it, and 1 of 20 in which clipping helps.
CLEAR_LEAD = 2.0
LOWEST_FACTOR = 1e-4  # in the stored trainings the best rate is .03 of the highest at the least
ATTEMPTS = 2  # a crashed run is tried once more, then left out
# Fresh seeds after which a question may be called decided. Below six no sign test could reach .05;
# three decide what is clear, and at the errors of `paired` all three looks err in .05 together.
LOOKS = (3, 6, 10)
# Fresh seeds after which a hopeless arm gets no more, and how far behind that is, in sd of a run.
# It leaves runs for the suggestion and costs nothing: simulated studies of 24 runs found .80 of the
# better models with it and .82 without.
DROP_AFTER = 2
HOPELESS_SD = 5.0
# Runs from which clipping is tried at the winning lower rate, too: from there on the four arms of
# the sentence have had six seeds each.
CLIPPED_LOWER_FROM = 40

# (from max_runs, explore, lr): the splits of DESIGN 4, from a simulation of 400 worlds each.
SPLITS = ((40, 10, 6), (30, 8, 6), (24, 7, 5), (16, 7, 3), (12, 6, 2))


@dataclass(frozen=True)
class Planned:
    """A run to start, or a free one to copy from the unclipped run of its seed.

    Attributes:
        max_norm: The max_norm to impose; inf is no clipping.
        lr_factor: What to multiply the learning rate by.
        seed: The seed of the run.
        stage: explore, lr or confirm.
        free: Whether to copy it from the unclipped run of the same seed and rate.
        reason: Why this run, in words.
        fraction: The share of the schedule to train.
    """

    max_norm: float
    lr_factor: float
    seed: int
    stage: Stage
    free: bool
    reason: str
    fraction: float = 1.0


@dataclass(frozen=True)
class Plan:
    """What may start now.

    Attributes:
        runs: Runs in order; parallel slots take from the front and ask again for more. Empty
            while running trials must end first, and when the study is done.
        stage: The stage now: explore, lr, confirm or done.
        reason: Why, in words.
    """

    runs: tuple[Planned, ...]
    stage: str
    reason: str


@dataclass(frozen=True)
class Split:
    """How `max_runs` is spent.

    Attributes:
        explore: Runs that search for the best max_norm on one seed.
        lr: Runs at most for the learning-rate search; what is left over confirms.
        confirm: Runs on fresh paired seeds.
        sentences: Which of the six sentences the budget can reach.
    """

    explore: int
    lr: int
    confirm: int
    sentences: tuple[int, ...]


def split(settings: Settings) -> Split:
    """How the runs of a study are divided, and which sentences they can reach."""
    n = settings.max_runs
    explore, lr = next(((e, r) for start, e, r in SPLITS if n >= start), (n, 0))
    if settings.explore_runs is not None:
        explore = min(settings.explore_runs, n)
        lr = min(lr, n - explore)
    if settings.lr_runs is not None:
        lr = min(settings.lr_runs, n - explore)
    confirm = n - explore - lr
    return Split(explore, lr, confirm, _sentences(lr, confirm // (settings.min_seeds or 2)))


def _sentences(lr: int, arms: int) -> tuple[int, ...]:
    """Sentence 1 needs pairs of four arms, 2 and 3 of three arms, the rest of two."""
    if arms < 2:
        return ()
    reachable = [4, 5, 6]
    if lr >= 1 and arms >= 3:
        reachable += [2, 3]
    if lr >= 3 and arms >= 4:
        reachable += [1]
    return tuple(sorted(reachable))


def free_from(largest_norm: float, *, half_precision: bool) -> float:
    """The smallest max_norm whose coefficient is 1.0 at every step, as torch computes it.

    Args:
        largest_norm: The largest norm of the unclipped run.
        half_precision: Whether the coefficient is computed in half precision.

    >>> round(free_from(2.0, half_precision=False), 6)
    2.000003
    """
    return 1.01 * largest_norm if half_precision else 1.000001 * largest_norm + 1e-6


def next_runs(settings: Settings, trials: Sequence[Trial]) -> Plan:
    """The next runs of a study; pure and deterministic.

    Args:
        settings: The study's settings.
        trials: All its trials, running and crashed ones included, in any order.
    """
    state = _State(settings, tuple(trials))
    for stage in (_explore, _learning_rate, _confirm):
        plan = stage(state)
        if plan is not None:
            return plan
    return Plan((), "done", state.why_done())


class _State:
    """The trials as the stages read them."""

    def __init__(self, settings: Settings, trials: tuple[Trial, ...]) -> None:
        self.settings = settings
        self.split = split(settings)
        self.trials = settle(trials, settings.direction)
        self.crashed = [t for t in trials if t.state == "crashed"]
        self.arms = choose_arms(settings, self.trials)

    def trial(self, arm: Arm, seed: int) -> Trial | None:
        return find(self.trials, arm, seed)

    def left_out(self, arm: Arm, seed: int) -> bool:
        """Whether the run crashed so often that it is not planned again."""
        crashes = [
            t
            for t in self.crashed
            if t.seed == seed and same(t.max_norm, arm[0]) and same(t.lr_factor, arm[1])
        ]
        return self.trial(arm, seed) is None and len(crashes) >= ATTEMPTS

    def open(self, arm: Arm, seed: int) -> bool:
        return self.trial(arm, seed) is None and not self.left_out(arm, seed)

    def running(self, *stages: str) -> bool:
        return any(t.state == "running" and t.stage in stages for t in self.trials)

    def spent(self, *stages: str) -> int:
        return sum(not t.free and t.stage in stages for t in self.trials)

    def planned(self, arm: Arm, seed: int, stage: Stage, reason: str) -> Planned:
        fraction = 1.0 if stage == "confirm" else self.settings.explore_fraction
        free = self.is_free(arm, seed)
        if free:
            reason = f"{reason}; free: no step of the unclipped run would be clipped"
        return Planned(arm[0], arm[1], seed, stage, free, reason, fraction)

    def is_free(self, arm: Arm, seed: int) -> bool:
        base = self.trial((math.inf, arm[1]), seed)
        return base is not None and base.ended and self._beyond(arm, base)

    def _beyond(self, arm: Arm, base: Trial) -> bool:
        half = self.settings.half_precision
        if not (self.settings.reuse and math.isfinite(arm[0]) and math.isfinite(base.largest_norm)):
            return False
        return arm[0] >= free_from(base.largest_norm, half_precision=half)

    def may_be_free(self, arm: Arm) -> bool:
        """Whether some seed's unclipped run already shows that no step would be clipped."""
        return any(
            math.isinf(t.max_norm)
            and same(t.lr_factor, arm[1])
            and t.ended
            and self._beyond(arm, t)
            for t in self.trials
        )

    def why_done(self) -> str:
        if not self.split.confirm:
            return "all runs are spent: leads, no verdict"
        return "the fresh seeds are spent, or every question is decided"


# --- explore -----------------------------------------------------------------------------------


def _explore(state: _State) -> Plan | None:
    seed = state.settings.seed
    none = (math.inf, 1.0)
    if state.left_out(none, seed):
        return Plan((), "done", "the unclipped run crashed twice; nothing can be compared with it")
    if state.open(none, seed):
        first = state.planned(none, seed, "explore", "no clipping, to which all is compared")
        return Plan((first,), "explore", "the unclipped run comes first")
    base = state.trial(none, seed)
    if base is None or not base.ended:
        return Plan((), "explore", "waiting for the unclipped run")
    left = state.split.explore - state.spent("explore")
    runs = _within(_first_values(state), left)
    if not runs and left > 0:
        runs = _asked(state)
    if runs:
        return Plan(tuple(runs), "explore", f"{left} of {state.split.explore} explore runs left")
    if state.running("explore"):
        return Plan((), "explore", "waiting for the explore runs")
    return None


def _within(runs: Sequence[Planned], left: int) -> list[Planned]:
    """As many runs as the budget allows; free ones cost nothing."""
    kept = []
    for run in runs:
        if run.free or left > 0:
            kept.append(run)
            left -= not run.free
    return kept


def _first_values(state: _State) -> list[Planned]:
    """Crashed runs to try again, anchors and log-spaced values, neither done nor running."""
    seed = state.settings.seed
    again = [(t.max_norm, "again after a crash") for t in state.crashed if t.stage == "explore"]
    wanted = _distinct([*again, *_anchors(state.settings), *_spaced(state)])
    return [
        state.planned((value, 1.0), seed, "explore", reason)
        for value, reason in wanted
        if state.open((value, 1.0), seed)
    ]


def _anchors(settings: Settings) -> list[tuple[float, str]]:
    named = [(settings.suggestion, "the suggestion")]
    if settings.current is not None and math.isfinite(settings.current):
        named.append((settings.current, "the loop's own max_norm"))
    named += [(value, "a common default") for value in COMMON]
    return _distinct(named)


def _distinct(named: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    kept: list[tuple[float, str]] = []
    for value, reason in named:
        if not any(same(value, other) for other, _ in kept):
            kept.append((value, reason))
    return kept


def _spaced(state: _State) -> list[tuple[float, str]]:
    """Middles of the largest gaps in log(max_norm), until there are `FIRST_VALUES` values."""
    settings = state.settings
    taken = [
        value for value, _ in _anchors(settings) if not state.is_free((value, 1.0), settings.seed)
    ]
    inside = sorted(v for v in taken if settings.low <= v <= settings.high)
    points = sorted({settings.low, *inside, settings.high})
    found = []
    for _ in range(FIRST_VALUES - len(taken)):
        gaps = [(math.log(b / a), -i) for i, (a, b) in enumerate(itertools.pairwise(points))]
        i = -max(gaps)[1]
        value = math.sqrt(points[i] * points[i + 1])
        points.insert(i + 1, value)
        found.append((value, "log-spaced, in the widest gap"))
    return found


def _asked(state: _State) -> list[Planned]:
    """The surrogate's next value; none where every value of the range would be free."""
    arm = (propose(state.settings, [*state.trials, *state.crashed]), 1.0)
    run = state.planned(arm, state.settings.seed, "explore", "proposed from the runs so far")
    return [] if run.free else [run]


# --- learning rate -----------------------------------------------------------------------------


def _learning_rate(state: _State) -> Plan | None:
    """Lower rates at once where clipping clearly leads; else only once fresh seeds say so."""
    if state.spent("lr") or clipping_leads(state.settings, state.trials, by=CLEAR_LEAD):
        return _lower_rates(state)
    return None


def _lower_rates(state: _State) -> Plan | None:
    budget = state.settings.max_runs - state.spent("explore", "lr", "confirm")
    left = min(state.split.lr - state.spent("lr"), budget)
    seed = state.settings.seed
    factors = [f for f in FIRST_FACTORS if state.open((math.inf, f), seed)]
    reason = "a lower learning rate instead of clipping"
    if not factors and not state.running("lr"):
        factors = [f for f in _refined(state) if state.open((math.inf, f), seed)]
        reason = "between or below the rates tried, until the best is bracketed"
    runs = [state.planned((math.inf, f), seed, "lr", reason) for f in factors][: max(left, 0)]
    if runs:
        return Plan(tuple(runs), "lr", "a clipped value leads: does a lower learning rate, too?")
    return _wait(state, "lr")


def _refined(state: _State) -> list[float]:
    tried = rates(state.settings, state.trials)
    wanted = unbracketed(tried)
    lowest = min(tried)
    start = _gradient_kept(state)
    wanted = tuple(start if f < lowest and start < lowest / 2 else f for f in wanted)
    return [f for f in wanted if f >= LOWEST_FACTOR]


def _gradient_kept(state: _State) -> float:
    """The rate that shortens SGD's path as the best clipping does; inf where it says nothing."""
    if state.settings.adaptive:
        return math.inf
    best = state.trial(state.arms.best, state.settings.seed)
    return best.kept if best is not None and LOWEST_FACTOR < best.kept < 1 else math.inf


def _wait(state: _State, stage: Stage) -> Plan | None:
    if state.running(stage):
        return Plan((), stage, f"waiting for the {stage} runs")
    return None


# --- confirm -----------------------------------------------------------------------------------


def _confirm(state: _State) -> Plan | None:
    budget = state.settings.max_runs - state.spent("explore", "lr", "confirm")
    for step in _steps(state):
        if step.lower_rates:
            plan = _lower_rates(state)
            if plan is not None:
                return plan
        runs = [
            state.planned(arm, seed, "confirm", step.reason)
            for arm, seed in step.cells
            if state.open(arm, seed) and _ready(state, arm, seed)
        ]
        runs = _within(runs, budget)
        if runs:
            return Plan(tuple(runs), "confirm", f"{budget} runs left for fresh paired seeds")
        if state.running("confirm"):
            return Plan((), "confirm", "waiting for the runs of these seeds")
        if any(state.open(arm, seed) for arm, seed in step.cells):
            return None
    return None


def _ready(state: _State, arm: Arm, seed: int) -> bool:
    """An arm that is likely free waits for the unclipped run of its seed."""
    none = (math.inf, arm[1])
    base = state.trial(none, seed)
    waits = base is None or base.state == "running"
    return not (waits and state.may_be_free(arm) and not state.left_out(none, seed))


@dataclass(frozen=True)
class _Step:
    """Runs that may go side by side: every arm with an open question, up to one look."""

    cells: tuple[tuple[Arm, int], ...]
    reason: str
    lower_rates: bool = False  # whether fresh seeds call for the learning-rate search first


def _steps(state: _State) -> Iterator[_Step]:
    """Fresh seeds look by look: first the arms of the sentence, then those of the suggestion.

    What an earlier step decides rests on the runs of the steps before it alone, so that a study
    that is killed and started again walks the same way.
    """
    first = state.settings.seed + 1
    first_look = state.settings.min_seeds or LOOKS[0]
    done: list[tuple[Arm, int]] = []
    for look in _looks(state.settings):
        for questions, reason in (
            (_sentence_arms, "fresh seeds for the sentence"),
            (_suggestion_arms, "fresh seeds for the suggestion"),
        ):
            if questions is _suggestion_arms and look < first_look:
                continue  # the sentence's third seed comes before the suggestion's first
            known = _known(state, done)
            arms = questions(state, known, look)
            cells = [(arm, first + i) for i in range(look) for arm in arms]
            done += cells
            late = look > first_look and not state.arms.lower
            late = late and verdict(state.settings, known).kind == 4
            yield _Step(tuple(cells), reason, lower_rates=late)
    lower = _clipped_lower(state, _known(state, done))
    yield _Step(lower, "is clipping worth it at the lower rate, too")


def _looks(settings: Settings) -> tuple[int, ...]:
    """How many fresh seeds there are when runs wait for answers; the first answers nothing yet.

    With `min_seeds` it does; further looks are apart from it, so that there are no more of them
    than without.
    """
    least = settings.min_seeds
    if least is None:
        return (DROP_AFTER, *LOOKS)
    return (least, *(n for n in LOOKS if n - least >= LOOKS[1] - LOOKS[0]))


def _known(state: _State, cells: Sequence[tuple[Arm, int]]) -> list[Trial]:
    """The trials that the confirming of `cells` could see."""
    return [
        t
        for t in state.trials
        if t.stage != "confirm" or any(t.seed == s and same_arm(t.arm, a) for a, s in cells)
    ]


def _distinct_arms(arms: Sequence[Arm | None]) -> list[Arm]:
    kept: list[Arm] = []
    for arm in arms:
        if arm is not None and not any(same_arm(arm, other) for other in kept):
            kept.append(arm)
    return kept


def _sentence_arms(state: _State, known: Sequence[Trial], look: int) -> list[Arm]:
    """The arms that the sentence still needs; a short budget serves the first of them."""
    chosen = state.arms
    lower = chosen.lower
    if look == _looks(state.settings)[0]:
        confirm = state.settings.max_runs - state.spent("explore", "lr")
        return _distinct_arms([chosen.none, chosen.best, *lower])[: max(confirm // look, 2)]
    said = verdict(state.settings, known)
    pairs: list[tuple[Arm, Arm]] = []
    if look == LOOKS[0]:  # only what is hopeless is settled by two seeds
        pairs = [(chosen.best, chosen.none), *((arm, chosen.best) for arm in lower)]
        runs = Runs(state.settings, known)
        pairs = [
            pair for pair in pairs if all(map(runs.of, pair)) and not _hopeless(runs, said, *pair)
        ]
    elif said.kind == 4:
        pairs = [
            (arm, chosen.best)
            for i, arm in enumerate(lower, start=1)
            if not _says(said, f"lower {i} vs best", "worse")
        ]
    elif said.kind == 6:
        pairs = [(chosen.best, chosen.none)]
        pairs += [
            (arm, chosen.best)
            for i, arm in enumerate(lower, start=1)
            if _ahead(said, f"lower {i} vs best")
        ]
    return _distinct_arms([arm for pair in pairs for arm in reversed(pair)])


def _suggestion_arms(state: _State, known: Sequence[Trial], look: int) -> list[Arm]:
    """The arms that the suggestion's questions still need."""
    chosen = state.arms
    said = verdict(state.settings, known)
    open_at_all = look == (state.settings.min_seeds or LOOKS[0])
    wanted: list[Arm | None] = []
    if said.suggestion_vs_best == "undecided":
        wanted += [chosen.suggestion, chosen.best]
    if said.suggestion_vs_none == "undecided":
        wanted += [chosen.suggestion, chosen.none]
    if chosen.current and (open_at_all or said.suggestion_vs_current == "undecided"):
        wanted += [chosen.suggestion, chosen.current]
    return _distinct_arms(wanted)


def _ahead(said: Verdict, name: str) -> bool:
    return name in said.comparisons and said.comparisons[name].difference < 0


def _says(said: Verdict, name: str, relation: str) -> bool:
    return name in said.comparisons and said.comparisons[name].relation == relation


def _hopeless(runs: Runs, said: Verdict, a: Arm, b: Arm) -> bool:
    """Whether one of two arms failed in every seed, or lies so far behind that it is decided."""
    x, y = runs.losses(a), runs.losses(b)
    seeds = [s for s in x if s in y]
    found = runs.compare(a, b, margin=said.margin.loss)
    if len(seeds) < DROP_AFTER or found.relation not in ("better", "worse"):
        return False
    far = abs(found.difference) > HOPELESS_SD * runs.single_run_sd()
    return found.reason == "reliability" or far


def _clipped_lower(state: _State, known: Sequence[Trial]) -> tuple[tuple[Arm, int], ...]:
    """The best max_norm at the winning lower rate, on the seeds that this rate has."""
    said = verdict(state.settings, known)
    if state.settings.max_runs < CLIPPED_LOWER_FROM or said.kind not in (2, 3):
        return ()
    rate = state.arms.lower[0][1]
    for i, (_, factor) in enumerate(state.arms.lower, start=1):
        if _says(said, f"lower {i} vs best", "better"):
            rate = factor
            break
    seeds = sorted(Runs(state.settings, known).of((math.inf, rate)))
    return tuple(((state.arms.best[0], rate), seed) for seed in seeds)


# --- words for --plan --------------------------------------------------------------------------

SENTENCES = {
    1: "clipping gives a better model",
    2: "a lower learning rate is better",
    3: "clipping only makes up for a learning rate that is too high",
    4: "clipping helps here; the lower rate is open",
    5: "equal",
    6: "undecided",
}


def describe_plan(settings: Settings, trials: Sequence[Trial] = (), *, jobs: int = 1) -> str:
    """What a study would run, how long it would take, and which sentences it can reach.

    Args:
        settings: The study's settings.
        trials: The trials so far; their seconds give the time.
        jobs: How many runs go at a time.
    """
    parts = split(settings)
    spent = sum(not t.free and t.state in ("finished", "diverged", "stuck") for t in trials)
    lines = [f"{settings.max_runs} runs at most, {spent} done:"]
    lines += [
        f"  {name:<8} {count:>3}  {what}"
        for name, count, what in (
            ("explore", parts.explore, "values of max_norm on one seed, no clipping first"),
            ("lr", parts.lr, "lower learning rates without clipping, where clipping leads"),
            ("confirm", parts.confirm, "the arms on fresh paired seeds"),
        )
        if count
    ]
    lines.append(_time_words(settings, trials, max(settings.max_runs - spent, 0), jobs))
    if parts.sentences:
        said = "; ".join(f"{n} {SENTENCES[n]}" for n in parts.sentences)
        lines.append(f"sentences within reach: {said}")
    else:
        lines.append("no sentence is within reach: it ends with leads. 24 runs reach all of them")
    return "\n".join(lines)


def _time_words(settings: Settings, trials: Sequence[Trial], left: int, jobs: int) -> str:
    full = [t.seconds / t.fraction for t in trials if t.seconds > 0 and not t.free]
    if not full:
        return "time: not known before the first run has ended"
    parts = split(settings)
    short = (parts.explore + parts.lr) * settings.explore_fraction
    share = (short + parts.confirm) / settings.max_runs
    hours = left * share * sum(full) / len(full) / jobs / 3600
    amount = f"{hours:.1f} hours" if hours >= 1 else f"{max(60 * hours, 0.1):.1f} minutes"
    return f"time left: about {amount} at {jobs} run{'s' * (jobs > 1)} a time"
