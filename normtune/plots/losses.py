"""Validation values over max_norm: every run of a study, its arms and their intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from normtune.format import number
from normtune.plots.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    frame,
    legend,
    log_axis,
)
from normtune.trials import Arm, Trial, same

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from matplotlib.axes import Axes

    from normtune.comparison import ArmRow
    from normtune.results import SearchResult

# The first part of an arm's label that is known here gives its looks.
LOOKS = {
    "suggestion": (ORANGE, "s"),
    "best found": (GREEN, "D"),
    "current": (PURPLE, "P"),
    "no clipping": (BLUE, "o"),
}
OTHER_LOOKS = (SKY, "v")
BEYOND = 1.5  # a run so many heights of the rest away from them is marked at the edge
COLUMN = 0.14  # of the clipped part's width
SPREAD = 0.016  # of the width, between the seeds of one arm


@dataclass(frozen=True)
class _Places:
    """Where arms stand: clipped ones at their max_norm, the others in columns beside them."""

    low: float
    high: float
    columns: tuple[float, ...]  # learning-rate factors without clipping

    @classmethod
    def of(cls, result: SearchResult) -> _Places:
        settings = result.settings
        clipped = [t.max_norm for t in result.trials if math.isfinite(t.max_norm)]
        # What is kept in a logarithmic box may come back in its last digit different.
        factors: list[float] = []
        for t in sorted(result.trials, key=lambda t: -t.lr_factor):
            if math.isinf(t.max_norm) and not any(same(t.lr_factor, f) for f in factors):
                factors.append(t.lr_factor)
        clipped += [settings.suggestion, *([settings.current] if settings.current else [])]
        return cls(min(clipped), max(clipped), tuple(factors or (1.0,)))

    @property
    def width(self) -> float:
        """Of the clipped part, as a factor."""
        return max(self.high / self.low, 10.0)

    def of_arm(self, arm: Arm) -> float:
        if math.isfinite(arm[0]):
            return arm[0]
        near = min(range(len(self.columns)), key=lambda i: abs(self.columns[i] - arm[1]))
        return float(self.high * self.width ** (COLUMN * (near + 0.8)))

    @property
    def border(self) -> float:
        """Between the clipped part and the columns."""
        return float(self.high * self.width ** (0.3 * COLUMN))

    @property
    def limits(self) -> tuple[float, float]:
        last = self.width ** (COLUMN * (len(self.columns) + 0.3))
        return float(self.low / self.width**0.05), float(self.high * last)


def plot_losses(result: SearchResult, ax: Axes) -> Axes:
    """Draw validation values over max_norm: seeds, arms with intervals, free and failed runs.

    Runs without clipping stand in columns at the right, one a learning rate. The bar at an arm's
    mean is the verdict's interval of its difference to no clipping; the grey band is what counts
    as equal to no clipping.

    Args:
        result: What a search found.
        ax: Where to draw.

    Returns:
        `ax`.
    """
    places = _Places.of(result)
    trials = [t for t in result.trials if t.ended]
    finished = [t for t in trials if t.state == "finished" and t.value is not None]
    ax.set_xlim(*places.limits)
    _set_view(ax, result, finished)
    _no_clipping(ax, result)
    _explored(ax, result, places, finished)
    for arm in reversed(result.verdict.arms):
        _draw_arm(ax, arm, result, places, finished)
    _failed(ax, [t for t in trials if t.state != "finished"], result, places)
    _beyond(ax, finished, places, result)
    ax.axvline(places.border, color=GREY, linewidth=0.8)
    log_axis(ax, "x")
    _name_columns(ax, places)
    legend(ax)
    word = "lower" if result.settings.direction == "minimize" else "higher"
    value = f"validation value ({word} is better)"
    return frame(ax, title=_title(result), x="max_norm", y=value)


def _title(result: SearchResult) -> str:
    seeds = len(result.verdict.seeds)
    return f"up to {seeds} fresh seeds an arm" if seeds > 1 else "one seed an arm; no verdict yet"


def _set_view(ax: Axes, result: SearchResult, finished: Sequence[Trial]) -> None:
    """Show the arms well; a run that is far worse is marked at the edge."""
    values = np.array([t.value for t in finished if t.value is not None])
    if not len(values):
        ax.set_ylim(0.0, 1.0)
        return
    fresh = [t.value for t in finished if t.stage == "confirm" and t.value is not None]
    core = np.array(fresh) if fresh else np.sort(values)[: max(len(values) // 2, 1)]
    best, worst = float(core.min()), float(core.max())
    reach = max(BEYOND * (worst - best), 0.02 * abs(best), 1e-12)
    ends = [end for arm in result.verdict.arms for end in _ends(arm, result.settings.direction)]
    low = min([max(float(values.min()), best - reach), *ends])
    high = max([min(float(values.max()), worst + reach), *ends])
    pad = 0.08 * max(high - low, 0.01 * abs(high), 1e-12)
    better_below = result.settings.direction == "minimize"
    room = 2.2 * pad  # for the marks of failed runs
    ax.set_ylim(low - (pad if better_below else room), high + (room if better_below else pad))


def _no_clipping(ax: Axes, result: SearchResult) -> None:
    verdict = result.verdict
    none = next((a for a in verdict.arms if math.isinf(a.max_norm) and a.lr_factor == 1.0), None)
    if none is None or not math.isfinite(none.mean):
        return
    ax.axhline(none.mean, color=BLUE, linewidth=0.9, linestyle="--", label="_")
    margin = verdict.margin.loss
    if math.isfinite(margin):
        label = f"equal within {number(margin)}"
        ends = none.mean - margin, none.mean + margin
        ax.axhspan(*ends, color=GREY, alpha=0.16, linewidth=0, label=label)


def _explored(ax: Axes, result: SearchResult, places: _Places, finished: Sequence[Trial]) -> None:
    """One seed: hollow, joined by a line where clipped; free runs are hollow diamonds."""
    runs = [t for t in finished if t.stage != "confirm"]
    clipped = sorted((t for t in runs if math.isfinite(t.max_norm)), key=lambda t: t.max_norm)
    own_rate = [t for t in clipped if same(t.lr_factor, 1.0) and t.seed == result.settings.seed]
    ax.plot(
        [t.max_norm for t in own_rate],
        [_value(t) for t in own_rate],
        color=GREY,
        linewidth=0.8,
        label="_",
    )
    for free, marker, label in ((False, "o", "explored, one seed"), (True, "d", "free (a copy)")):
        some = [t for t in runs if t.free is free]
        if some:
            x = [places.of_arm(t.arm) for t in some]
            _hollow(ax, (x, [_value(t) for t in some]), (GREY, marker), label)


def _draw_arm(
    ax: Axes, arm: ArmRow, result: SearchResult, places: _Places, finished: Sequence[Trial]
) -> None:
    names = arm.label.split(", ")
    color, marker = next((v for k, v in LOOKS.items() if k in names), OTHER_LOOKS)
    at = places.of_arm((arm.max_norm, arm.lr_factor))
    runs = sorted(_of(arm, finished), key=lambda t: t.seed)
    low, high = places.limits
    for free in (False, True):
        shown = [(i, t) for i, t in enumerate(runs) if t.free is free]
        x = [at * (high / low) ** (SPREAD * (i - (len(runs) - 1) / 2)) for i, _ in shown]
        y = [_value(t) for _, t in shown]
        if free and x:
            _hollow(ax, (x, y), (color, "d"), "_")
        elif x:
            ax.plot(x, y, color=color, marker=".", markersize=4, linestyle="none", label="_")
    if math.isfinite(arm.mean):
        _mean(ax, arm, at, _ends(arm, result.settings.direction), (color, marker))


def _ends(arm: ArmRow, direction: str) -> tuple[float, ...]:
    """The interval of an arm's difference to no clipping, laid around its mean."""
    below, above = arm.delta - arm.delta_low, arm.delta_high - arm.delta
    if direction == "maximize":
        below, above = above, below
    ends = arm.mean - below, arm.mean + above
    return ends if all(map(math.isfinite, ends)) else ()


def _mean(ax: Axes, arm: ArmRow, at: float, ends: Sequence[float], looks: tuple[str, str]) -> None:
    color, marker = looks
    ax.errorbar(
        [at],
        [arm.mean],
        yerr=[[arm.mean - ends[0]], [ends[1] - arm.mean]] if ends else None,
        color=color,
        marker=marker,
        markersize=7,
        capsize=4,
        elinewidth=1.6,
        markeredgecolor="#ffffff",
        markeredgewidth=0.8,
        label=_arm_label(arm),
    )


def _arm_label(arm: ArmRow) -> str:
    value = f" {number(arm.max_norm)}" if math.isfinite(arm.max_norm) else ""
    failed = f", {arm.failed} of {arm.seeds} failed" if arm.failed else ""
    return f"{arm.label}{value}{failed}"


def _failed(ax: Axes, failed: Sequence[Trial], result: SearchResult, places: _Places) -> None:
    """Diverged runs and those that never learned, at the bad edge."""
    if failed:
        edge = 0.97 if result.settings.direction == "minimize" else 0.03
        diverged = sum(t.state == "diverged" for t in failed)
        parts = ((diverged, "diverged"), (len(failed) - diverged, "never learned"))
        label = ", ".join(f"{what} ({n})" for n, what in parts if n)
        ax.plot(
            _apart([places.of_arm(t.arm) for t in failed], places),
            [edge] * len(failed),
            transform=ax.get_xaxis_transform(),
            color=RED,
            marker="x",
            markersize=6,
            linestyle="none",
            label=label,
        )


def _beyond(ax: Axes, finished: Sequence[Trial], places: _Places, result: SearchResult) -> None:
    """Finished runs outside the view, as arrows at the edge."""
    low, high = ax.get_ylim()
    above = [t for t in finished if _value(t) > high]
    below = [t for t in finished if _value(t) < low]
    minimize = result.settings.direction == "minimize"
    for runs, marker, edge in ((above, "^", 0.93 if minimize else 0.98), (below, "v", 0.02)):
        if runs:
            worst = max(runs, key=_value) if marker == "^" else min(runs, key=_value)
            ax.plot(
                _apart([places.of_arm(t.arm) for t in runs], places),
                [edge] * len(runs),
                transform=ax.get_xaxis_transform(),
                color=GREY,
                marker=marker,
                markersize=5,
                linestyle="none",
                label=f"beyond ({len(runs)}, to {number(_value(worst))})",
            )


def _apart(places: Iterable[float], within: _Places) -> list[float]:
    """The same places with a step between those that coincide."""
    low, high = within.limits
    seen: dict[float, int] = {}
    moved = []
    for place in places:
        n = seen[place] = seen.get(place, -1) + 1
        moved.append(float(place * (high / low) ** (SPREAD * n)))
    return moved


def _hollow(
    ax: Axes, at: tuple[Sequence[float], Sequence[float]], looks: tuple[str, str], name: str
) -> None:
    color, marker = looks
    ax.plot(*at, marker, color=color, markersize=5, fillstyle="none", label=name)


def _name_columns(ax: Axes, places: _Places) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    decades = range(math.floor(math.log10(places.low)) - 1, math.ceil(math.log10(places.high)) + 1)
    steps: tuple[int, ...] = (1, 2, 5) if places.high / places.low < 100 else (1, 3)
    steps = (1,) if places.high / places.low > 10_000 else steps
    low, _ = places.limits
    ticks = [k * 10.0**d for d in decades for k in steps if low <= k * 10.0**d < places.border]
    words = [number(tick) for tick in ticks]
    for factor in places.columns:
        ticks.append(places.of_arm((math.inf, factor)))
        words.append(f"{number(factor, 2)}x")
    named = dict(zip(ticks, words, strict=True))
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: named.get(value, "")))
    ax.tick_params(axis="x", labelsize="small", labelcolor=INK)
    middle = math.sqrt(places.border * places.limits[1])
    ax.text(
        middle,
        1.01,
        "no clipping, lr times" if len(places.columns) > 2 else "no clipping",
        transform=ax.get_xaxis_transform(),
        ha="center",
        fontsize="x-small",
        color=INK,
    )


def _of(arm: ArmRow, trials: Iterable[Trial]) -> list[Trial]:
    return [
        t
        for t in trials
        if t.stage == "confirm"
        and same(t.max_norm, arm.max_norm)
        and same(t.lr_factor, arm.lr_factor)
    ]


def _value(trial: Trial) -> float:
    return math.nan if trial.value is None else trial.value
