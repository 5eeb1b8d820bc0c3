"""Pictures of the stored sweep: loss over max_norm above the norms, and regret by rule."""

from __future__ import annotations

import math
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from rules import DEFAULT, FIXED, REGIMES, Curve, finite, over_tasks, regimes
from sweep import ONLINE, warm_up

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# By kind of rate; the second one is for a second rate of that kind.
COLOURS = dict(
    zip(
        REGIMES,
        (("tab:green", "darkgreen"), ("tab:blue", "navy"), ("tab:red", "darkred")),
        strict=True,
    )
)
OWN = {"transformer": "AdamW"}  # the optimizer of a study; SGD where not named
SHOWN = ("p90", "p10", "p50", "p99", "capped", "tail", "unstable", *FIXED, *ONLINE)
ACROSS = 4  # studies beside each other
BEYOND = 3.0  # how far the norms' range is left on both sides, as a factor


def draw_curves(all_curves: list[Curve], path: Path) -> None:
    """One column a study: its loss over max_norm at every rate, and the warm-up's norms below."""
    studies = list(dict.fromkeys(c.study for c in all_curves))
    rows = math.ceil(len(studies) / ACROSS)
    figure = Figure(figsize=(12.5, 4.2 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, ACROSS, squeeze=False, height_ratios=[3.2, 1] * rows)
    for spare in axes.flat:
        spare.set_visible(False)
    regime = regimes(all_curves)
    for i, study in enumerate(studies):
        optimizer = OWN.get(study, "SGD")
        mine = [c for c in all_curves if (c.study, c.optimizer) == (study, optimizer)]
        losses, norms = axes[2 * (i // ACROSS), i % ACROSS], axes[2 * (i // ACROSS) + 1, i % ACROSS]
        shade = {name: count() for name in REGIMES}
        for c in mine:
            kind = regime[c.name]
            colour = COLOURS[kind][min(next(shade[kind]), 1)]
            draw_curve(c, losses, norms, colour)
        frame(mine, losses, norms)
        losses.set_title(f"{study}, {optimizer}", fontsize=10, pad=20)
        losses.set_ylabel("validation loss" if i % ACROSS == 0 else "")
        norms.set_ylabel("steps" if i % ACROSS == 0 else "")
    figure.savefig(path, dpi=90)


def draw_curve(c: Curve, losses: Axes, norms: Axes, colour: str) -> None:
    """Loss over max_norm with no clipping as a broken line, and a histogram of the norms."""
    label = f"lr {c.lr:g}"
    runs = [m for m in c.means.index if math.isfinite(m)]
    losses.plot(runs, c.means[runs], ".-", color=colour, label=label, linewidth=1.2)
    losses.fill_between(
        runs, c.scores[runs].min(), c.scores[runs].max(), color=colour, alpha=0.12, linewidth=0
    )
    losses.axhline(c.means[math.inf], color=colour, linestyle="--", linewidth=0.9)
    suggested = c.column(c.value(DEFAULT))
    if math.isfinite(suggested):
        losses.plot(
            suggested, c.means[suggested], "o", mfc="white", mec=colour, markersize=7, zorder=5
        )
    kept = finite(warm_up(c.norms, c.steps))
    kept = kept[kept > 0]
    bins = np.geomspace(kept.min(), kept.max() * 1.001, 25)
    norms.hist(kept, bins=list(bins), color=colour, histtype="step", linewidth=1.2)
    norms.hist(kept, bins=list(bins), color=colour, alpha=0.15)


def frame(mine: list[Curve], losses: Axes, norms: Axes) -> None:
    """Both panels of a study over one range: that of the grid, not of a warm-up that exploded."""
    for axes in (losses, norms):
        axes.set_visible(True)
        axes.set_xscale("log")
        medians = [float(np.median(finite(warm_up(c.norms, c.steps)))) for c in mine]
        axes.set_xlim(min(medians) / 100 / BEYOND, max(medians) * 10 * BEYOND)
    low = min(float(c.scores.to_numpy().min()) for c in mine)
    if low > 0:
        losses.set_yscale("log")
        losses.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        losses.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        losses.yaxis.set_minor_formatter(NullFormatter())
    losses.set_xticklabels([])
    losses.legend(
        fontsize=8,
        loc="lower center",
        bbox_to_anchor=(0.5, 0.99),
        ncols=len(mine),
        frameon=False,
        handlelength=1.0,
        columnspacing=1.0,
    )
    norms.set_xlabel("max_norm above, norm here")
    norms.set_yticks([])


def draw_regret(data: pd.DataFrame, path: Path) -> None:
    """Share of the range lost by rule, with its interval over tasks, at two kinds of rates."""
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    shown = [name for name in SHOWN if name in set(data["method"])][::-1]
    panels = figure.subplots(1, 2, sharey=True)
    for axes, regime in zip(panels, REGIMES[1:], strict=True):
        for y, name in enumerate(shown):
            part = data[(data["method"] == name) & (data["regime"] == regime)]
            mean, low, high = (100 * v for v in over_tasks(part))
            colour = "tab:blue" if name == DEFAULT else "dimgray"
            axes.plot([low, high], [y, y], color=colour, linewidth=1.5)
            axes.plot(mean, y, "o", color=colour)
            axes.annotate(
                f"{part['failed'].sum()} of {part['runs'].sum()}",
                (1.02, y),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=8,
            )
        axes.axvline(0, color="black", linewidth=0.8)
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(f"learning rate: {regime}", fontsize=10)
        axes.text(1.02, 1.02, "failed", transform=axes.transAxes, fontsize=8)
        axes.set_xlabel("share of the range lost, %")
    panels[0].set_yticks(range(len(shown)), shown)
    figure.savefig(path, dpi=90)
