"""Whether all that write into one log tell the same norm of a step."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

ALIKE = 2e-3  # relative: norms of one model on all ranks, printed with four digits
MOST = 256  # lines of other ranks that are compared
FEWEST = 3  # steps that differ
NEAR = 8  # rows: so far apart different values of one step are looked for
ADVICE = (
    "what one rank measures before the gradients are reduced is not the norm of the model; log "
    "what clip_grad_norm_ returns, on one rank"
)


class OtherRanks:
    """The norms that other ranks told than the one that is read."""

    def __init__(self) -> None:
        self._told: list[tuple[int, float]] = []

    @property
    def wanted(self) -> bool:
        """Whether more lines are looked at."""
        return len(self._told) < MOST

    def add(self, step: int, value: float) -> None:
        """Keep what a line told."""
        self._told.append((step, value))

    def differ(self, steps: Integers | None, norms: Floats) -> str:
        """The sentence for ranks that differ from the one that was read; empty where none does."""
        if steps is None or not self._told:
            return ""
        own: dict[int, set[float]] = {}
        for step, norm in zip(steps.tolist(), norms.tolist(), strict=True):
            own.setdefault(step, set()).add(norm)
        compared = [(v, own[s]) for s, v in self._told if s in own]
        other = sum(not any(_alike(value, mine) for mine in known) for value, known in compared)
        if other < FEWEST or 2 * other < len(compared):
            return ""
        return (
            f"other ranks tell other norms for the same steps ({other} of {len(compared)} lines "
            f"that were compared): {ADVICE}"
        )


def _alike(a: float, b: float) -> bool:
    same = a == b or (math.isnan(a) and math.isnan(b))
    return same or math.isclose(a, b, rel_tol=ALIKE)


def several_values(steps: Integers | None, norms: Floats) -> str:
    """The sentence for a log in which most steps have values that differ; else empty."""
    if steps is None or len(steps) < 2 * FEWEST or bool(np.all(steps[1:] > steps[:-1])):
        return ""
    found: set[int] = set()
    for lag in range(1, min(NEAR, len(steps) - 1) + 1):
        same = (steps[lag:] == steps[:-lag]) & (
            steps[lag:] >= 0
        )  # a step that is not known is below
        near = np.isclose(norms[lag:], norms[:-lag], rtol=ALIKE, atol=0.0, equal_nan=True)
        found.update(np.unique(steps[lag:][same & ~near]).tolist())
    n = len(np.unique(steps))
    if len(found) < FEWEST or 2 * len(found) < n:
        return ""
    return (
        f"{len(found)} of {n} steps have several values that differ, as where each rank, or each "
        f"part of a model, logs its own: {ADVICE}"
    )
