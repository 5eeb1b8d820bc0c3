"""Which parameters the norm comes from, over the steps."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import numpy as np

from normtune.format import share
from normtune.plots.style import counts, frame, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes

    from normtune.records import NormRecord
    from normtune.statistics import Floats

MOST_ROWS = 20
COLUMNS = 120
OTHERS = "all others"


def plot_groups(record: NormRecord, ax: Axes) -> Axes:
    """Draw each group's share of the total norm over the steps, the largest groups on top.

    The shares of one step add up to 1: ``(group / total) ** norm_type``.

    Args:
        record: A record with norms per parameter or group.
        ax: Where to draw.

    Returns:
        `ax`.

    Raises:
        ValueError: If the record holds no groups.
    """
    if not record.groups:
        message = "record must hold norms per group; record with NormRecorder(..., groups=...)"
        raise ValueError(message)
    rows = _largest(group_shares(record))
    columns = min(COLUMNS, len(record))
    picture = np.array([_in_columns(values, columns) for values in rows.values()])
    ends = (float(record.steps[0]) - 0.5, float(record.steps[-1]) + 0.5)
    image = ax.imshow(
        np.ma.masked_invalid(picture),
        aspect="auto",
        interpolation="nearest",
        cmap="cividis",
        vmin=0.0,
        extent=(*ends, len(rows) - 0.5, -0.5),
    )
    ax.set_yticks(range(len(rows)), [shown(name, 26) for name in rows], fontsize="x-small")
    bar = ax.figure.colorbar(image, ax=ax, format=lambda value, _: share(value), pad=0.02)
    bar.ax.tick_params(labelsize="x-small")
    counts(ax.xaxis)
    frame(ax, title="share of the squared norm" if _order(record) == 2 else "share", x="step", y="")
    return ax


def group_shares(record: NormRecord) -> dict[str, Floats]:
    """Each group's share of the whole at each step; nan where it was not recorded."""
    order = _order(record)
    values = np.array(list(record.groups.values()))
    # Whatever the norms' size, the powers neither overflow nor vanish.
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column without a group
        largest = np.nanmax(values, axis=0)
        relative = values / largest
        powers = relative if math.isinf(order) else relative**order
        shares = powers / np.nansum(powers, axis=0)
    shares[~np.isfinite(values)] = np.nan
    return dict(zip(record.groups, shares, strict=True))


def _order(record: NormRecord) -> float:
    try:
        order = float(record.metadata.get("norm_type", 2.0))
    except (TypeError, ValueError):
        return 2.0
    return order if order > 0 else 2.0


def _largest(shares: Mapping[str, Floats]) -> dict[str, Floats]:
    """The rows of the picture: the groups of the largest mean share, and the rest as one."""
    means = {n: float(np.nanmean(v)) if np.isfinite(v).any() else 0.0 for n, v in shares.items()}
    order = sorted(shares, key=lambda name: -means[name])
    room = len(order) if len(order) <= MOST_ROWS else MOST_ROWS - 1
    rows = {name: shares[name] for name in order[:room]}
    if order[room:]:
        rest = np.array([shares[name] for name in order[room:]])
        summed = np.where(np.isfinite(rest).any(axis=0), np.nansum(rest, axis=0), np.nan)
        rows[f"{OTHERS} ({len(order) - room})"] = summed
    return rows


def _in_columns(values: Floats, columns: int) -> Floats:
    """The mean of each of so many spans; nan where a span holds no number."""
    where = np.arange(len(values)) * columns // len(values)
    known = np.isfinite(values)
    sums = np.bincount(where[known], weights=values[known], minlength=columns)
    counts = np.bincount(where[known], minlength=columns)
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, sums / counts, np.nan)
