"""What waits between a clip call and its step: norms, and how the gradients looked then."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from normtune import gradients

Norm = Tensor | float  # a tensor stays on its device; on the CPU the number is there already


@dataclass(eq=False)
class Series:
    """One set of parameters whose norm is recorded.

    Attributes:
        name: The clip call's ``file:line``, or the optimizer.
        by: ``"clip"``, ``"step"``, ``"backward"``, ``"given"`` or ``"compiled clip"``.
        norm_type: The p of its norm.
        ids: ``id`` of each parameter.
        tensors: How many parameters.
        parameters: How many numbers they hold.
    """

    name: str
    by: str
    norm_type: float
    ids: frozenset[int]
    tensors: int
    parameters: int


class Look(NamedTuple):
    """One gradient as it was; tells later whether it was replaced or written to.

    Attributes:
        parameter: Whose gradient it is.
        grad: The gradient; neither is kept alive.
        version: How often it was written to.
    """

    parameter: weakref.ref[Tensor]
    grad: weakref.ref[Tensor]
    version: int

    def replaced(self) -> bool:
        """Whether the parameter has another gradient tensor now, or none."""
        parameter = self.parameter()
        if parameter is None:
            return True
        grad = parameter.grad
        return grad is None or grad is not self.grad()

    def changed(self) -> bool:
        """Whether the gradient was written to since."""
        grad = self.grad()
        return grad is None or _version(grad) != self.version


def look(parameter: Tensor) -> Look:
    """Look at the gradient of `parameter` as it is now."""
    grad = parameter.grad
    assert grad is not None  # noqa: S101  chosen among those with a gradient
    return Look(weakref.ref(parameter), weakref.ref(grad), _version(grad))


def looks(with_grad: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Look]:
    """Look at the gradients of the first, the middle and the last."""
    found = []
    for i in spread(len(grads)):
        grad = grads[i]
        found.append(Look(weakref.ref(with_grad[i]), weakref.ref(grad), _version(grad)))
    return found


def _version(grad: Tensor) -> int:
    if type(grad) not in gradients.PLAIN:
        grad = getattr(grad, "_local_tensor", grad)  # a DTensor's own counter does not move
    try:
        return grad._version
    except RuntimeError:  # inference tensors count nothing
        return 0


@dataclass(eq=False, slots=True)
class Event:
    """A clip call, or the end of a backward pass, that waits for its step."""

    series: Series
    norm: Norm
    each: EachNorm | None
    kind: str
    asked: float
    backward: int
    looks: Sequence[Look] = ()  # at three of its gradients, after the call
    imposed: float | None = None
    scale: Tensor | None = None
    given: Tensor | None = None  # the loop's own; on a device only its identity can be compared
    used: bool = False
    repeats: bool = False

    def replaced(self) -> bool:
        """Whether the gradients of the event are gone."""
        return not self.looks or any(x.replaced() for x in self.looks)

    def changed(self) -> bool:
        """Whether the gradients of the event were written to since."""
        return any(x.changed() for x in self.looks)


@dataclass(eq=False)
class EachNorm:
    """The norm of each parameter: their ids and one tensor of shape ``(n,)`` on the device."""

    ids: tuple[int, ...]
    norms: Tensor


@dataclass(eq=False, slots=True)
class Measured:
    """One norm of one step, on its way into the record."""

    series: Series
    norm: Norm
    each: EachNorm | None = None
    asked: float | None = None
    skipped: Tensor | bool = False


@dataclass(slots=True)
class Step:
    """What a step's gradients turned out to be.

    Attributes:
        rows: The norms to record.
        uncovered: Parameters with a gradient that no valid clip call was given.
        clipped: Whether some valid clip call acted on this step's gradients.
        partly: Whether clip calls cover some of the parameters, but not all.
    """

    rows: list[Measured] = field(default_factory=list)
    uncovered: list[Tensor] = field(default_factory=list)
    clipped: bool = False
    partly: bool = False


def spread(n: int) -> tuple[int, ...]:
    """First, middle and last of `n`, each once."""
    return (0, n >> 1, n - 1) if n >= 3 else tuple(range(n))


def row_of(event: Event) -> Measured:
    """What the record takes of an event, on the scale of the true gradients."""
    norm = event.norm if event.scale is None else divided(event.norm, event.scale)
    asked = event.asked if event.kind != "backward" else None
    return Measured(event.series, norm, event.each, asked)


def uncovered(with_grad: list[Tensor], ids: frozenset[int], valid: Sequence[Event]) -> list[Tensor]:
    """The parameters that no valid clip call was given."""
    if any(ids <= event.series.ids for event in valid):
        return []
    covered: set[int] = set().union(*(event.series.ids for event in valid))
    return [p for p in with_grad if id(p) not in covered]


def had_these(earlier: Event, event: Event, now: int, *, sure: bool) -> bool:
    """Whether `earlier` had the gradients of `event` already, before anything clipped them.

    Unless backward passes are counted for `sure`, none may have written to them since.
    """
    return (
        earlier.backward == now
        and not earlier.used
        and event.series.ids <= earlier.series.ids
        and not earlier.replaced()
        and (sure or not earlier.changed())
    )


def divided(norm: Norm, scale: Tensor) -> Norm:
    """A norm of gradients that a GradScaler has scaled, as it would be without."""
    if isinstance(norm, Tensor):
        return norm / scale.to(norm.device)
    return norm / float(scale) if scale.device.type == "cpu" else norm / scale


def distinct(events: list[Event]) -> list[Event]:
    """One norm given to several direct calls (one per device mesh) is one norm."""
    kept: list[Event] = []
    for event in events:
        twin = event.kind == "given" and any(
            e.kind == "given" and (e.given is event.given or _same(e.norm, event.norm))
            for e in kept
        )
        if not twin:
            kept.append(event)
    return kept


def _same(a: Norm, b: Norm) -> bool:
    return isinstance(a, float) and a == b
