"""The belt of an unclipped warm-up: it holds a training that is about to die."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from typing import Any

# A warm-up can die at its third step or at its hundredth (EVIDENCE): a few steps make a median.
AFTER = 10  # steps
ABOVE = 100.0  # x the running median
CLIP = 10.0  # x the running median


class Belt:
    """Watches the norms of an unclipped warm-up.

    Args:
        until: The step that ends the warm-up.
        rule: The rule that then suggests the max_norm.
    """

    def __init__(self, until: int, rule: Any) -> None:
        self.until = until
        self.rule = rule
        self._sorted: list[float] = []

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Belt:
        """The belt that `state` was taken from."""
        belt = cls(int(state["until"]), state["rule"])
        belt._sorted = sorted(state["seen"])
        return belt

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint; a rule that is a function cannot be among them."""
        rule = self.rule if isinstance(self.rule, str) else None
        return {"until": self.until, "rule": rule, "seen": list(self._sorted)}

    def limit(self, norm: float) -> float:
        """Infinity while all is well, 10 x the running median for a spike, 0.0 to skip the step."""
        if len(self._sorted) < AFTER:
            return math.inf
        if not math.isfinite(norm):
            return 0.0
        median = self._sorted[len(self._sorted) // 2]
        return CLIP * median if norm > ABOVE * median > 0 else math.inf

    def saw(self, norm: float) -> None:
        """Count a norm into the running median."""
        if math.isfinite(norm):
            bisect.insort(self._sorted, norm)
