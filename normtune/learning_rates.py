"""A factor on an optimizer's learning rates that lives only during the arithmetic of a step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from normtune.errors import StudyError


class ScaledRates:
    """Scales the learning rates of an optimizer and puts them back.

    The loop's own code and its schedulers never see a scaled value. A value that was set while
    the rates were scaled is kept.

    Args:
        optimizer: Anything with ``param_groups`` whose groups have a number or tensor as ``lr``.
        factor: What to multiply with, above 0.

    Raises:
        StudyError: If a group's ``lr`` is no number (Adafactor's None is computed inside the step).
    """

    def __init__(self, optimizer: Any, factor: float) -> None:
        self._optimizer = optimizer
        self._factor = float(factor)  # int x int may give the same object again
        self._kept: list[tuple[dict[str, Any], Any, Any]] = []
        for group in optimizer.param_groups:
            if not isinstance(group.get("lr"), int | float | Tensor):
                message = (
                    f"cannot scale the learning rate of {type(optimizer).__name__}: its lr is "
                    f"{group.get('lr')!r}, computed inside the step; give it a number"
                )
                raise StudyError(message)

    def scale(self) -> None:
        """Scale now; rates that an interrupted step left scaled are put back first."""
        self.restore()
        for group in self._optimizer.param_groups:
            own = group["lr"]
            scaled = own * self._factor
            group["lr"] = scaled
            self._kept.append((group, own, scaled))

    def restore(self) -> None:
        """Put the rates back, but for those that were set meanwhile."""
        for group, own, scaled in self._kept:
            if group["lr"] is scaled:
                group["lr"] = own
        self._kept.clear()
