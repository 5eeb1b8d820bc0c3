"""Pictures of the stored sweep: loss over max_norm above the norms, and regret by rule."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from rules import FIXED, REGIMES, Curve, finite, over_tasks, regimes
from sweep import ONLINE, warm_up

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

COLOURS = dict(zip(REGIMES, ("tab:green", "tab:blue", "tab:red"), strict=True))
OWN = {"transformer": "AdamW"}  # the optimizer of a study; SGD where not named
SHOWN = ("p90", "p10", "p50", "p99", "capped", "by_optimizer", "unstable", *FIXED, *ONLINE)


def draw_curves(all_curves: list[Curve], path: Path) -> None:
    """One column a study: its loss over max_norm at every rate, and the warm-up's norms below."""
    studies = list(dict.fromkeys(c.study for c in all_curves))
    figure = Figure(figsize=(12, 3.6 * math.ceil(len(studies) / 4)), layout="constrained")
    rows = math.ceil(len(studies) / 4)
    axes = figure.subplots(2 * rows, 4, squeeze=False, height_ratios=[3, 1] * rows)
    for spare in axes.flat:
        spare.set_visible(False)
    regime = regimes(all_curves)
    for i, study in enumerate(studies):
        mine = [c for c in all_curves if c.study == study]
        mine = [c for c in mine if c.optimizer == OWN.get(study, "SGD")]
        losses, norms = axes[2 * (i // 4), i % 4], axes[2 * (i // 4) + 1, i % 4]
        for c in mine:
            draw_curve(c, losses, norms, COLOURS[regime[c.name]])
        losses.set_title(f"{study}, {OWN.get(study, 'SGD')}", fontsize=10)
        losses.set_ylabel("validation loss" if i % 4 == 0 else "")
        norms.set_xlabel("max_norm, norm")
    figure.savefig(path, dpi=80)


def draw_curve(c: Curve, losses: Axes, norms: Axes, colour: str) -> None:
    """Loss over max_norm with no clipping as a broken line, and a histogram of the norms."""
    for axes in (losses, norms):
        axes.set_visible(True)
        axes.set_xscale("log")
    means = c.means[np.isfinite(c.means.index)]
    losses.plot(means.index, means, ".-", color=colour, label=f"lr {c.lr:g}")
    losses.axhline(c.means[math.inf], color=colour, linestyle="--", linewidth=0.8)
    losses.set_xlim(means.index.min(), means.index.max())
    losses.legend(fontsize=7)
    kept = finite(warm_up(c.norms, c.steps))
    kept = kept[kept > 0]
    bins = np.geomspace(kept.min(), kept.max() * 1.001, 30)
    norms.hist(kept, bins=list(bins), color=colour, alpha=0.4)
    norms.sharex(losses)
    norms.set_yticks([])


def draw_regret(data: pd.DataFrame, path: Path) -> None:
    """Share of the range lost by rule, with its interval over tasks, at two kinds of rates."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    shown = [name for name in SHOWN if name in set(data["method"])][::-1]
    panels = figure.subplots(1, 2, sharey=True)
    for axes, regime in zip(panels, REGIMES[1:], strict=True):
        for y, name in enumerate(shown):
            part = data[(data["method"] == name) & (data["regime"] == regime)]
            mean, low, high = (100 * v for v in over_tasks(part))
            axes.barh(y, mean, color="tab:blue" if name == "p90" else "lightsteelblue")
            axes.plot([low, high], [y, y], color="black", linewidth=1)
        axes.set_title(f"learning rate: {regime}", fontsize=10)
        axes.set_xlabel("share of the range lost, %")
    panels[0].set_yticks(range(len(shown)), shown)
    figure.savefig(path, dpi=80)
