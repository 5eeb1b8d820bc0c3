"""Suggestions on matplotlib axes; nothing here opens a window."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from normtune import statistics
from normtune.format import clean, number, share

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.axes import Axes

    from normtune.statistics import Floats
    from normtune.suggestion import Suggestion

    Steps = npt.NDArray[np.int64]

MOST_POINTS = 4000
BLUE, ORANGE, GREY, RED = "#3b6ea5", "#d9730d", "#9a9a9a", "#c0392b"
PERCENTILES = ("p10", "p50", "p90", "p99")


def plot_suggestion(suggestion: Suggestion, ax: Axes | None = None) -> Axes | tuple[Axes, Axes]:
    """Draw the norms over the steps with the suggested max_norm, and their distribution.

    Args:
        suggestion: What `suggest` gave.
        ax: Axes for the norms over the steps. Without it a new figure gets two axes, the second
            for the distribution.

    Returns:
        `ax`, or both axes of the new figure.
    """
    if ax is not None:
        return plot_norms(suggestion, ax)
    import matplotlib.pyplot as plt

    _, (left, right) = plt.subplots(
        1, 2, figsize=(11.0, 4.0), width_ratios=(5, 3), sharey=True, layout="constrained"
    )
    plot_norms(suggestion, left)
    plot_distribution(suggestion, right)
    right.set_ylabel("")
    return left, right


def plot_norms(suggestion: Suggestion, ax: Axes) -> Axes:
    """Draw norms over steps on a log scale: clipped and non-finite steps are marked."""
    record = suggestion.record
    used = ~record.skipped
    steps, norms = record.steps[used], record.norms[used]
    good = np.isfinite(norms) & (norms > 0)
    _draw_norms(ax, steps[good], norms[good], suggestion.max_norm)
    _mark_nonfinite(ax, steps[~np.isfinite(norms)])
    _suggestion_line(ax, suggestion)
    _log_scale(ax)
    ax.set_xlabel("step")
    ax.set_ylabel("gradient norm before clipping")
    ax.set_title(_title(suggestion), fontsize="medium")
    ax.legend(loc="best", fontsize="small", framealpha=0.9)
    return ax


def plot_distribution(suggestion: Suggestion, ax: Axes) -> Axes:
    """Draw how often which norm occurred, with percentiles, 1.0, 10.0 and the suggestion."""
    norms = suggestion.record.finite
    norms = norms[norms > 0]
    low, high = np.log10(norms.min()), np.log10(norms.max())
    bins = np.logspace(low - 0.02, high + 0.02, 50)
    ax.hist(norms, bins=bins.tolist(), orientation="horizontal", color=BLUE, alpha=0.55)
    _suggestion_line(ax, suggestion)
    _draw_references(ax, suggestion, float(norms.min()), float(norms.max()))
    _label(ax, suggestion.max_norm, clean(suggestion.label))
    _log_scale(ax)
    ax.set_xlabel("steps")
    ax.set_ylabel("gradient norm before clipping")
    ax.set_title("distribution", fontsize="medium")
    return ax


def thin(steps: Steps, norms: Floats, most: int = MOST_POINTS) -> tuple[Steps, Floats]:
    """At most `most` points: every so many-th, and the least and the largest of each span.

    >>> steps, norms = thin(np.arange(1000), np.sin(np.arange(1000.0)), most=20)
    >>> len(steps) <= 20, float(norms.max()) == float(np.sin(np.arange(1000.0)).max())
    (True, True)
    """
    n = len(norms)
    if n <= most:
        return steps, norms
    edges = np.linspace(0, n, max(most // 20, 1) + 1).astype(int)
    extremes = [a + f(norms[a:b]) for a, b in pairwise(edges) for f in (np.argmin, np.argmax)]
    regular = np.linspace(0, n - 1, most - 2 * (len(edges) - 1)).astype(int)
    chosen = np.unique(np.concatenate([np.array(extremes), regular]))
    return steps[chosen], norms[chosen]


def _draw_norms(ax: Axes, steps: Steps, norms: Floats, max_norm: float) -> None:
    few = len(steps) <= MOST_POINTS // 4
    if few:
        ax.plot(steps, norms, color=BLUE, linewidth=0.5, alpha=0.4)
    steps, norms = thin(steps, norms)
    clipped = statistics.coefficients(norms, max_norm) < 1
    size = 12.0 if few else 5.0
    ax.scatter(steps[~clipped], norms[~clipped], s=size, color=BLUE, linewidths=0)
    if clipped.any():
        above = steps[clipped], norms[clipped]
        ax.scatter(*above, s=size, color=ORANGE, linewidths=0, label="would be clipped")


def _mark_nonfinite(ax: Axes, steps: Steps) -> None:
    if not len(steps):
        return
    shown = steps[np.linspace(0, len(steps) - 1, min(len(steps), 200)).astype(int)]
    ax.plot(
        shown,
        np.full(len(shown), 0.985),
        linestyle="none",
        marker="x",
        color=RED,
        markersize=6,
        transform=ax.get_xaxis_transform(),
        label=f"not finite ({len(steps)})",
    )


def _suggestion_line(ax: Axes, suggestion: Suggestion) -> None:
    label = f"max_norm {number(suggestion.max_norm, 8)} ({clean(suggestion.label)})"
    ax.axhline(suggestion.max_norm, color=ORANGE, linewidth=1.4, label=label)


def _draw_references(ax: Axes, suggestion: Suggestion, low: float, high: float) -> None:
    """The current value, the usual defaults and percentiles, where they lie among the norms."""
    rank = {"current": 0, "1.0": 1, "10.0": 1} | dict.fromkeys(PERCENTILES, 2)
    shown = [c for c in suggestion.candidates if c.name in rank and not c.suggested]
    taken = [math.log(suggestion.max_norm)]
    for candidate in sorted(shown, key=lambda c: rank[c.name]):
        value = candidate.max_norm
        if not low / 3 < value < high * 3:
            continue
        ax.axhline(value, color=GREY, linewidth=0.8, linestyle=":")
        gap = 0.05 * math.log(high / low)
        if all(abs(math.log(value) - other) > gap for other in taken):
            _label(ax, value, candidate.name)
            taken.append(math.log(value))


def _label(ax: Axes, value: float, text: str) -> None:
    ax.text(
        1.01,
        value,
        text,
        transform=ax.get_yaxis_transform(),
        ha="left",
        va="center",
        fontsize="x-small",
        color="#555555",
    )


def _log_scale(ax: Axes) -> None:
    """A log axis with plain numbers; within one decade the ticks between are named too."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    ax.set_yscale("log")
    plain = FuncFormatter(lambda value, _: number(value))
    low, high = ax.get_ylim()
    ax.yaxis.set_major_formatter(plain)
    ax.yaxis.set_minor_formatter(plain if high / low < 5 else NullFormatter())


def _title(suggestion: Suggestion) -> str:
    chosen = next(c for c in suggestion.candidates if c.suggested)
    return f"{suggestion.n_steps} steps; {share(chosen.clipped)} would be clipped"
