"""Which parameters carry the largest norms: their share of the squared norm on the top steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from normtune.records import NormRecord

TOP = 0.01  # the share of the steps that counts as the top
MOST = 3  # names
LEAST = 0.05  # a smaller share is not worth naming


@dataclass(frozen=True)
class Share:
    """One parameter's or group's part in the largest steps.

    Attributes:
        name: The group.
        top: Its share of the total norm on the top 1 % of the steps, from 0 to 1 (of the squared
            norm for the usual norm_type 2).
        all: The same over all steps.
    """

    name: str
    top: float
    all: float


def largest_shares(record: NormRecord) -> tuple[Share, ...]:
    """The groups that carry most of the norm on the top 1 % of the steps, the largest first.

    Args:
        record: A record with norms of groups; without them the result is empty.

    Returns:
        At most three shares, none below 5 %.
    """
    if not record.groups:
        return ()
    names = list(record.groups)
    parts = np.array([record.groups[name] for name in names])
    usable = np.isfinite(record.norms) & ~record.skipped & np.isfinite(parts).any(axis=0)
    if not usable.any():
        return ()
    power = _power(record)
    parts, norms = np.nan_to_num(parts[:, usable]), record.norms[usable]
    scale = parts.max() or 1.0  # squares of huge norms stay finite
    weights = (parts / scale) ** power
    top = np.argsort(norms)[-max(1, math.ceil(TOP * len(norms))) :]
    shares = [
        Share(name, *(float(_part(weights[:, where], i)) for where in (top, slice(None))))
        for i, name in enumerate(names)
    ]
    found = sorted(shares, key=lambda share: -share.top)[:MOST]
    return tuple(share for share in found if share.top >= LEAST)


def _power(record: NormRecord) -> float:
    p = record.metadata.get("norm_type", 2.0)
    return float(p) if isinstance(p, int | float) and math.isfinite(p) else 2.0


def _part(weights: np.ndarray[tuple[int, ...], np.dtype[np.float64]], i: int) -> float:
    """The mean over steps of the i-th row's share of its column."""
    whole = weights.sum(axis=0)
    with np.errstate(invalid="ignore"):
        return float(np.nanmean(np.where(whole > 0, weights[i] / whole, np.nan)))
