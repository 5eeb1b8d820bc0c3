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
from normtune.trials import Arm, Settings, Trial, same_arm

__all__ = [
    "ArmRow",
    "Comparison",
    "Margin",
    "Verdict",
    "compare",
    "comparisons",
    "format_verdict",
    "verdict",
]


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
    more = _seeds_to_decide(kind, found)
    relations = _suggestion(runs, found)
    return Verdict(
        kind=kind,
        sentence=sentence(kind, runs, found, margin, more),
        arms=tuple(_row(runs, arm, margin.loss) for arm in runs.distinct),
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
    if names:
        return ", ".join(names)
    rate = f"at {number(arm[1])}x lr"
    return f"no clipping {rate}" if math.isinf(arm[0]) else f"clipped {rate}"


# --- text ----------------------------------------------------------------------------------------


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
    max_norm = "none" if math.isinf(row.max_norm) else number(row.max_norm)
    failed = f"{row.failed} of {row.seeds}"
    change = ""
    if row.free == row.seeds:
        change = "identical runs (free)"
    elif math.isfinite(row.delta):
        change = f"{row.delta:+.3g}"
        if math.isfinite(row.delta_low):
            change += f" ({row.delta_low:+.3g} to {row.delta_high:+.3g})"
    return (
        f"{row.label:<28}{max_norm:>9}{number(row.lr_factor) + 'x':>8}{number(row.mean):>10}"
        f"{number(row.sd):>9}{failed:>8}  {change}"
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
    parts = [f"{number(margin.loss)} in loss", f"{number(margin.percent)} %"]
    if math.isfinite(margin.sd):
        parts.append(f"{number(margin.sd)} sd of a single run")
    return f"Margin: {', '.join(parts)} ({margin.source})."
