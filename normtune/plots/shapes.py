"""What the norms are, and what each max_norm would do to them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from normtune.format import number, share
from normtune.plots.norms import threshold_line
from normtune.plots.style import BLUE, GREY, INK, ORANGE, counts, frame, legend, log_axis, shown
from normtune.statistics import TORCH_EPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from normtune.statistics import Floats
    from normtune.suggestion import Candidate, Suggestion

BINS = 50
VALUES = 160  # of max_norm at which a curve is drawn
RANK = {"current": 0, "1.0": 1, "10.0": 1, "p10": 2, "p50": 2, "p90": 2, "p99": 2}
NEAR = 10.0  # a value further from the norms than this is told, not drawn


def plot_distribution(suggestion: Suggestion, ax: Axes) -> Axes:
    """Draw how often which norm occurred, with percentiles, 1.0, 10.0 and the suggestion.

    Args:
        suggestion: What `suggest` gave.
        ax: Where to draw.

    Returns:
        `ax`.
    """
    norms = suggestion.record.finite
    norms = norms[norms > 0]
    low, high = float(norms.min()), float(norms.max())
    edges = np.logspace(math.log10(low) - 0.02, math.log10(high) + 0.02, BINS)
    ax.hist(
        norms,
        bins=edges.tolist(),
        orientation="horizontal",
        color=BLUE,
        alpha=0.55,
        histtype="stepfilled",
    )
    near, far = _references(suggestion, low, high)
    threshold_line(ax, suggestion)
    _label_right(ax, suggestion.max_norm, shown(suggestion.label))
    _draw_references(ax, near, [math.log(suggestion.max_norm)], math.log(high / low))
    _tell_far(ax, far, high)
    log_axis(ax, "y")
    counts(ax.xaxis)
    return frame(ax, title="distribution", x="steps", y="gradient norm before clipping")


def plot_effect(suggestion: Suggestion, ax: Axes) -> Axes:
    """Draw the gradient kept and the share of steps clipped as functions of max_norm.

    Args:
        suggestion: What `suggest` gave.
        ax: Where to draw.

    Returns:
        `ax`.
    """
    finite = suggestion.record.finite
    norms = finite[finite > 0]
    low, high = float(norms.min()), float(norms.max())
    near, far = _references(suggestion, low, high)
    values = [suggestion.max_norm, *(c.max_norm for c in near)]
    grid = np.geomspace(min(low, *values) / 1.5, max(high, *values) * 1.5, VALUES)
    clipped, kept = effect_curves(finite, grid)
    ax.plot(grid, kept, color=BLUE, linewidth=2.0, label="gradient kept (mean)")
    ax.plot(grid, clipped, color=ORANGE, linewidth=1.6, linestyle="--", label="steps clipped")
    ax.set_xlim(grid[0], grid[-1])
    ax.set_ylim(-0.02, 1.04)
    chosen = next(c for c in suggestion.candidates if c.suggested)
    ax.axvline(suggestion.max_norm, color=ORANGE, linewidth=1.2)
    for y, color in ((chosen.kept, BLUE), (chosen.clipped, ORANGE)):
        ax.plot([suggestion.max_norm], [y], marker="o", color=color, markersize=5, label="_")
    taken = [math.log(suggestion.max_norm)]
    _label_top(ax, suggestion.max_norm, shown(suggestion.label))
    for candidate in near:
        ax.axvline(candidate.max_norm, color=GREY, linewidth=0.8, linestyle=":")
        if _free(candidate.max_norm, taken, 0.07 * math.log(grid[-1] / grid[0])):
            _label_top(ax, candidate.max_norm, candidate.name)
    _tell_far(ax, far, high)
    log_axis(ax, "x")
    ax.yaxis.set_major_formatter(lambda value, _: share(value))
    legend(ax)
    frame(ax, title="", x="max_norm", y=_kept_label(suggestion))
    return ax


def effect_curves(norms: Floats, values: Floats) -> tuple[Floats, Floats]:
    """The share of steps clipped, and the mean gradient kept, at each max_norm of `values`.

    >>> effect_curves(np.array([1.0, 2.0, 4.0]), np.array([2.5]))[0].round(3).tolist()
    [0.333]
    """
    ordered = np.sort(norms) + TORCH_EPS
    n = len(ordered)
    inverse = np.concatenate([np.cumsum((1 / ordered)[::-1])[::-1], [0.0]])
    below = np.searchsorted(ordered, values, side="right")
    return (n - below) / n, (below + values * inverse[below]) / n


def _kept_label(suggestion: Suggestion) -> str:
    plain_sgd = "SGD" in suggestion.optimizer and "Adam" not in suggestion.optimizer
    return "share (kept = learning-rate factor)" if plain_sgd else "share"


def _references(
    suggestion: Suggestion, low: float, high: float
) -> tuple[list[Candidate], list[Candidate]]:
    """The values to compare with, most wanted first: those near the norms, and the usual far."""
    known = [c for c in suggestion.candidates if c.name in RANK and not c.suggested]
    known.sort(key=lambda c: RANK[c.name])
    near = [c for c in known if low / NEAR < c.max_norm < high * NEAR]
    return near, [c for c in known if c not in near]


def _draw_references(
    ax: Axes, candidates: list[Candidate], taken: list[float], spread: float
) -> None:
    for candidate in candidates:
        value = candidate.max_norm
        ax.axhline(value, color=GREY, linewidth=0.8, linestyle=":")
        if _free(value, taken, 0.06 * max(spread, 1.0)):
            _label_right(ax, value, candidate.name)


def _free(value: float, taken: list[float], gap: float) -> bool:
    """Whether a label at `value` has room beside those drawn before it."""
    if any(abs(math.log(value) - other) < gap for other in taken):
        return False
    taken.append(math.log(value))
    return True


def _tell_far(ax: Axes, far: list[Candidate], high: float) -> None:
    words = [
        f"{c.name} ({number(c.max_norm)})" if c.name == "current" else c.name
        for c in sorted(far, key=lambda c: c.max_norm)
    ]
    sides = ["above" if c.max_norm > high else "below" for c in far]
    if words:
        verb = "lies" if len(words) == 1 else "lie"
        text = f"{', '.join(words)} {verb} far {sides[0]} all norms"
        ax.text(0.98, 0.02, text, transform=ax.transAxes, ha="right", fontsize="x-small", color=INK)


def _label_right(ax: Axes, value: float, text: str) -> None:
    across = ax.get_yaxis_transform()
    ax.text(1.01, value, text, transform=across, va="center", fontsize="x-small", color=INK)


def _label_top(ax: Axes, value: float, text: str) -> None:
    up = ax.get_xaxis_transform()
    ax.text(value, 1.01, text, transform=up, ha="center", fontsize="x-small", color=INK)
