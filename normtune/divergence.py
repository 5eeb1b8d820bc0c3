"""Whether a training has diverged, seen from its norms while it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

DEAD_NORMS = 3  # non-finite ones in a row; a single one may be a step that the loop leaves out
FIRST_NORMS = 10  # whose median is what is usual
# In 147 stored unclipped trainings that finished, ten norms in a row never all exceeded 19 x the
# median of the first ten, while single ones reached 410 x; published logs stay below 6 x, but for
# one that had died, at 1e16 x.
EXPLODED = 1e4
EXPLODED_NORMS = 10  # in a row


class Divergence:
    """Watches the norms of one training, series by series.

    Args:
        weights_died: Whether a weight is no longer finite; it is asked only after non-finite norms,
            since a loop or an engine may leave such steps out by itself.
    """

    def __init__(self, weights_died: Callable[[], bool]) -> None:
        self._weights_died = weights_died
        self._series: dict[str, _Series] = {}

    def saw(self, norms: Iterable[tuple[str, float]]) -> str:
        """Take the norms of further steps.

        Args:
            norms: (series, norm before clipping) of each step that was taken.

        Returns:
            Why the training has diverged, in words; empty where it has not.
        """
        for name, norm in norms:
            why = self._series.setdefault(name, _Series()).saw(norm)
            if why and (math.isfinite(norm) or self._weights_died()):
                return why
        return ""


class _Series:
    def __init__(self) -> None:
        self._first: list[float] = []
        self._limit = math.inf
        self._dead = self._high = 0

    def saw(self, norm: float) -> str:
        if not math.isfinite(norm):
            self._dead += 1
            dead = self._dead % DEAD_NORMS == 0
            return f"{DEAD_NORMS} gradient norms in a row were not finite" if dead else ""
        self._dead = 0
        if len(self._first) < FIRST_NORMS:
            self._begin(norm)
        self._high = self._high + 1 if norm > self._limit else 0
        if self._high < EXPLODED_NORMS:
            return ""
        return f"the gradient norms exploded: {EXPLODED_NORMS} in a row above {self._limit:.3g}"

    def _begin(self, norm: float) -> None:
        if norm > 0:
            self._first.append(norm)
        if len(self._first) == FIRST_NORMS:
            self._limit = EXPLODED * float(np.median(self._first))
