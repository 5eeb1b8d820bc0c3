"""The sentences that a verdict ends with, in words for who never met them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from normtune.arms import rates
from normtune.paired import MAX_MORE_SEEDS, Comparison
from normtune.trials import explored, find, loss_of, same

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from normtune.fresh import Margin, Runs

Kind = Literal[1, 2, 3, 4, 5, 6, "none"]
ENOUGH_RUNS = 24  # from here on every sentence can be reached (DESIGN 4, split)


def number(x: float) -> str:
    """`x` with three significant digits."""
    return f"{x:.3g}"


def sentence(
    kind: Kind,
    runs: Runs,
    found: Mapping[str, Comparison],
    margin: Margin,
    more_seeds: int | None,
) -> str:
    """The sentence of a kind.

    Args:
        kind: Which of the six, or ``"none"`` where no fresh seed was run.
        runs: The fresh runs.
        found: The comparisons, as `normtune.comparison.comparisons` names them.
        margin: The margin.
        more_seeds: Further seeds that would decide; None where unknown.
    """
    best = number(runs.arms.best[0])
    within = f"within {number(margin.loss)}"
    if kind == "none":
        return _lead(runs)
    rate = ", ".join(f"{number(arm[1])}x" for arm in runs.arms.lower) or "none"
    where = "at learning rate " + number(runs.settings.lr) if runs.settings.lr else "at this rate"
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
        6: f"Undecided {where}: "
        + _undecided_words(found.get("best vs none"), f"max_norm {best}", gain, more_seeds),
    }[kind]
    return f"{text}. {_seeds_words(runs)}."


def _gain_words(c: Comparison | None) -> str:
    if c is None:
        return ""
    if c.reason == "reliability":
        return f" ({c.failed_b} of {c.n} runs failed without, {c.failed_a} with it)"
    if not math.isfinite(c.low):
        return ""
    return f" by {number(-c.difference)} ({number(-c.high)} to {number(-c.low)})"


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
            return f"{number(arm[1])}x the rate"
    return "a lower rate"


def _tried(runs: Runs) -> str:
    lower = [f for f in rates(runs.settings, runs.all) if f < 1]
    return ", ".join(f"{number(f)}x" for f in lower) or "none"


def _undecided_words(c: Comparison | None, best: str, gain: str, more_seeds: int | None) -> str:
    if c is not None and c.n == c.failed_a == c.failed_b:
        return f"every run failed, with {best} and without clipping; lower the learning rate first"
    return f"{best} against no clipping{gain}; {_more_words(more_seeds)}"


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
    leader = f"max_norm {number(runs.arms.best[0])}" if a < b else "no clipping"
    return f"{leader} leads on one seed, no verdict: {more}."


def notes(runs: Runs, found: Mapping[str, Comparison], margin: Margin) -> tuple[str, ...]:
    """Further sentences: the margin, identical runs, clipping at the lower rate."""
    said = [f"margin: {margin.note}"] if margin.note else []
    if runs.settings.raised:
        times = "once" if runs.settings.raised == 1 else f"{runs.settings.raised} times"
        said.append(
            f"the budget was raised {times} after a verdict; each time halves the error that is "
            "allowed to a claim, since another look is another chance to be right by luck"
        )
    said += [f"{name}: identical runs" for name, c in found.items() if c.reason == "identical"]
    for i, arm in enumerate(runs.arms.lower, start=1):
        c = found.get(f"clipped lower {i} vs lower {i}")
        if c is not None:
            words = {"better": "still helps", "worse": "hurts", "equal": "makes no difference"}
            does = words.get(c.relation, "is undecided")
            said.append(f"clipping at {number(arm[1])}x the learning rate {does} there")
    return tuple(said)
