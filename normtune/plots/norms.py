"""Norms over the steps: points where they are few, bands where they are many."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from normtune import statistics
from normtune.format import count, number, share
from normtune.plots.style import BLUE, GREY, ORANGE, RED, counts, frame, legend, log_axis, shown

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.axes import Axes

    from normtune.records import NormRecord
    from normtune.statistics import Floats
    from normtune.suggestion import Suggestion

    Steps = npt.NDArray[np.int64]

MOST_POINTS = 2000  # drawn one by one; more steps become bands
BANDS = 240  # spans of steps that a band is drawn from
MOST_CLIPPED = 800  # points of clipped steps over a band
MOST_MARKS = 200  # crosses of one kind
MOST_STARTS = 4  # earlier starts of the run that are drawn
POINTS_PER_START = 400
CLIPPED = (ORANGE, "^")


def plot_norms(suggestion: Suggestion, ax: Axes, *, earlier: Sequence[NormRecord] = ()) -> Axes:
    """Draw norms over steps on a log scale; clipped, non-finite and skipped steps are marked.

    Args:
        suggestion: What `suggest` gave.
        ax: Where to draw.
        earlier: Earlier starts of the same run, drawn behind.

    Returns:
        `ax`.
    """
    record = suggestion.record
    steps, norms = record.steps[~record.skipped], record.norms[~record.skipped]
    good = np.isfinite(norms) & (norms > 0)
    _draw_earlier(ax, earlier)
    draw = _points if good.sum() <= MOST_POINTS else _bands
    draw(ax, steps[good], norms[good], suggestion.max_norm)
    _mark(ax, steps[~np.isfinite(norms)], "x", RED, "not finite")
    _mark(ax, record.steps[record.skipped], "|", GREY, "skipped by the GradScaler")
    threshold_line(ax, suggestion)
    _current_line(ax, suggestion)
    log_axis(ax, "y")
    counts(ax.xaxis)
    legend(ax)
    return frame(ax, title=_title(suggestion), x="step", y="gradient norm before clipping")


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


def threshold_line(ax: Axes, suggestion: Suggestion) -> None:
    """The suggested max_norm across the picture."""
    label = f"suggested max_norm {number(suggestion.max_norm, 8)} ({shown(suggestion.label)})"
    ax.axhline(suggestion.max_norm, color=ORANGE, linewidth=1.4, label=label)


def _current_line(ax: Axes, suggestion: Suggestion) -> None:
    if suggestion.current is not None:
        label = f"current max_norm {number(suggestion.current, 8)}"
        ax.axhline(suggestion.current, color=GREY, linewidth=1.2, linestyle="--", label=label)


def _points(ax: Axes, steps: Steps, norms: Floats, max_norm: float) -> None:
    few = len(steps) <= MOST_POINTS // 2
    if few:
        ax.plot(steps, norms, color=BLUE, linewidth=0.6, alpha=0.3)
    clipped = statistics.coefficients(norms, max_norm) < 1
    size = 3.0 if few else 2.0
    _dots(ax, (steps[~clipped], norms[~clipped]), (BLUE, "."), size + 1)
    _dots(ax, (steps[clipped], norms[clipped]), CLIPPED, size + 0.5, "would be clipped")


def _bands(ax: Axes, steps: Steps, norms: Floats, max_norm: float) -> None:
    edges = np.linspace(0, len(norms), BANDS + 1).astype(int)
    spans = [norms[a:b] for a, b in pairwise(edges)]
    quantiles = np.array([np.percentile(span, (0, 10, 50, 90, 100)) for span in spans]).T
    low, p10, p50, p90, high = quantiles
    at = steps[(edges[:-1] + edges[1:] - 1) // 2]
    ax.fill_between(at, low, high, color=BLUE, alpha=0.18, linewidth=0, label="least to largest")
    ax.fill_between(at, p10, p90, color=BLUE, alpha=0.38, linewidth=0, label="p10 to p90")
    ax.plot(at, p50, color=BLUE, linewidth=1.2, label="median")
    clipped = np.flatnonzero(statistics.coefficients(norms, max_norm) < 1)
    # The spikes are what one looks for; the bands say the rest.
    spikes = clipped[norms[clipped] > np.repeat(p90, np.diff(edges))[clipped]]
    above = thin(steps[spikes], norms[spikes], MOST_CLIPPED)
    _dots(ax, above, CLIPPED, 2.0, "would be clipped (a sample)")


def _dots(
    ax: Axes, at: tuple[Steps, Floats], looks: tuple[str, str], size: float, name: str = ""
) -> None:
    steps, norms = at
    if len(steps):
        (marks,) = ax.plot(steps, norms, looks[1], color=looks[0], markersize=size)
        marks.set(markeredgewidth=0.6 if looks[1] == "+" else 0.0, label=name or "_")


def _draw_earlier(ax: Axes, earlier: Sequence[NormRecord]) -> None:
    for i, start in enumerate(earlier[-MOST_STARTS:]):
        good = np.isfinite(start.norms) & (start.norms > 0) & ~start.skipped
        kept = thin(start.steps[good], start.norms[good], POINTS_PER_START)
        label = "" if i else f"{count(len(earlier), 'earlier start')} of the run"
        _dots(ax, kept, (GREY, "+"), 3.0, label)


def _mark(ax: Axes, steps: Steps, marker: str, color: str, what: str) -> None:
    """Steps without a norm to draw, at the upper edge."""
    if not len(steps):
        return
    ax.plot(
        steps[np.linspace(0, len(steps) - 1, min(len(steps), MOST_MARKS)).astype(int)],
        np.full(min(len(steps), MOST_MARKS), 0.985),
        linestyle="none",
        marker=marker,
        color=color,
        markersize=6,
        transform=ax.get_xaxis_transform(),
        label=f"{what} ({len(steps)})",
    )


def _title(suggestion: Suggestion) -> str:
    chosen = next(c for c in suggestion.candidates if c.suggested)
    return f"{count(suggestion.n_steps, 'step')}; {share(chosen.clipped)} would be clipped"
