"""Suggestions and results on matplotlib axes; nothing here opens a window."""

from __future__ import annotations

from typing import TYPE_CHECKING

from normtune.plots.groups import group_shares, plot_groups
from normtune.plots.losses import plot_losses
from normtune.plots.norms import MOST_POINTS, plot_norms, thin
from normtune.plots.shapes import effect_curves, plot_distribution, plot_effect

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from normtune.suggestion import Suggestion

__all__ = [
    "MOST_POINTS",
    "effect_curves",
    "group_shares",
    "plot_distribution",
    "plot_effect",
    "plot_groups",
    "plot_losses",
    "plot_norms",
    "plot_suggestion",
    "thin",
]


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
