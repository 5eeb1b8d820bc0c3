"""The verdict on clipping, learning rate and suggestion, from fresh paired seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from normtune.arms import Arms, rates, unbracketed
from normtune.fresh import Margin, Runs, margin_of
from normtune.paired import Comparison, compare, share_interval
from normtune.sentences import Kind, notes, number, sentence
from normtune.trials import COMMON, Arm, Settings, Trial, find, loss_of, same, same_arm

__all__ = [
    "ArmRow",
    "Comparison",
    "Margin",
    "Verdict",
    "compare",
    "comparisons",
    "verdict",
]


@dataclass(frozen=True)
class ArmRow:
    """One arm over the fresh seeds; or, with none of them, a max_norm on the explore seed alone.

    Attributes:
        label: What the arm is, such as ``"no clipping"`` or ``"suggestion"``.
        max_norm: Its max_norm; inf is no clipping.
        lr_factor: Its learning-rate factor.
        mean: Mean validation value of finished runs, as the user's direction has it; else nan.
        sd: Their sample sd; nan below two.
        seeds: Fresh seeds that the arm ran.
        failed: Runs among them that diverged or never learned; of the explore seed without any.
        failed_low: Lower end of the exact 95 % interval of the failure rate.
        failed_high: Upper end of it.
        free: Runs among them that were copied from the unclipped run; likewise.
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
class Verdict:
    """What a study can say.

    Attributes:
        kind: Which of the six sentences, 1 to 6, or ``"none"`` where no fresh seed was run.
        sentence: The sentence, with learning rate, seeds and what the seed varied.
        arms: One row an arm.
        explored: A row for no clipping, the best, the suggestion, the current value, 1 and 10
            where they had no fresh seed: what the explore seed says, nan where it did not run them.
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
    explored: tuple[ArmRow, ...]
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


def verdict(settings: Settings, trials: Sequence[Trial], arms: Arms | None = None) -> Verdict:
    """What the trials so far can say, by fresh paired seeds alone.

    Args:
        settings: The study's settings.
        trials: All its trials; running and crashed ones are left out.
        arms: Which arms are compared, where something else than the study chose them.
    """
    runs = Runs(settings, trials, arms)
    margin = margin_of(runs)
    found = comparisons(runs, margin.loss)
    kind = _kind(runs, found)
    more = _seeds_to_decide(kind, found)
    relations = _suggestion(runs, found)
    return Verdict(
        kind=kind,
        sentence=sentence(kind, runs, found, margin, more),
        arms=tuple(_row(runs, arm, margin.loss) for arm in runs.distinct),
        explored=_explored(runs),
        **relations,
        best=runs.arms.best[0],
        best_lr_factor=runs.arms.lower[0][1] if runs.arms.lower else math.nan,
        margin=margin,
        seeds=tuple(sorted({t.seed for t in runs.fresh})),
        more_seeds=more,
        comparisons=found,
        notes=notes(runs, found, margin),
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
        if not same_arm(a, b) and runs.of(a) and runs.of(b)
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
    if same_arm(runs.arms.suggestion, runs.arms.best):
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
    is_none = same_arm(arm, runs.arms.none)
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


def _explored(runs: Runs) -> tuple[ArmRow, ...]:
    """What people ask about always has a row, of one seed where there is no more."""
    arms = runs.arms
    asked = [arms.none, arms.best, arms.suggestion, *([arms.current] if arms.current else [])]
    asked += [(value, 1.0) for value in COMMON]
    kept: list[Arm] = []
    for arm in asked:
        if not any(same_arm(arm, other) for other in (*runs.distinct, *kept)):
            kept.append(arm)
    return tuple(_explored_row(runs, arm) for arm in kept)


def _explored_row(runs: Runs, arm: Arm) -> ArmRow:
    settings = runs.settings
    found = (find(runs.all, a, settings.seed) for a in (arm, runs.arms.none))
    run, base = (t if t is not None and t.ended else None for t in found)
    direction = settings.direction
    losses = [math.inf if t is None else loss_of(t, direction) for t in (run, base)]
    finished = run is not None and math.isfinite(losses[0])
    clips = not same_arm(arm, runs.arms.none)
    return ArmRow(
        label=_label(runs.arms, arm),
        max_norm=arm[0],
        lr_factor=arm[1],
        mean=run.value if run is not None and finished and run.value is not None else math.nan,
        sd=math.nan,
        seeds=0,
        failed=int(run is not None and not finished),
        failed_low=0.0,
        failed_high=1.0,
        free=int(run is not None and run.free),
        clip_share=run.clip_share if run is not None else math.nan,
        delta=losses[0] - losses[1] if clips and all(map(math.isfinite, losses)) else math.nan,
        delta_low=math.nan,
        delta_high=math.nan,
        p_better=math.nan,
    )


def _label(arms: Arms, arm: Arm) -> str:
    names = []
    if same_arm(arm, arms.none):
        names.append("no clipping")
    if same_arm(arm, arms.suggestion):
        names.append("suggestion")
    if same_arm(arm, arms.best):
        names.append("best found")
    if arms.current and same_arm(arm, arms.current):
        names.append("current")
    if not names and arm[1] == 1.0 and any(same(arm[0], value) for value in COMMON):
        names.append("common default")
    if names:
        return ", ".join(names)
    rate = f"at {number(arm[1])}x lr"
    return f"no clipping {rate}" if math.isinf(arm[0]) else f"clipped {rate}"
