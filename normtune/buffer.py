"""Measured norms on their way into a record: kept on the device, read once a flush."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from normtune import records
from normtune.events import EachNorm, Measured, Series
from normtune.records import FileStore, Finding, MemoryStore, Row

SURE_AFTER = 3  # times that a finding must be seen before it forbids a suggestion


@dataclass(eq=False, slots=True)
class Pending:
    """A measured step whose values may still be on the device."""

    measured: Measured
    step: int
    imposed: float | None  # the max_norm of the recorder
    lr: float
    belted: bool

    @property
    def max_norm(self) -> float:
        """The max_norm in force; nan where the loop asked for a senseless one."""
        if self.imposed is not None:
            return self.imposed
        asked = self.measured.asked
        if asked is None:
            return math.inf
        return asked if asked > 0 else math.nan


@dataclass(eq=False, slots=True)
class _Values:
    """What the pending steps measured, on the host: one of each for each step."""

    norms: list[float]
    skipped: list[bool]
    each: list[list[float] | None]


class Buffer:
    """Steps of one attempt that wait for the next flush, and the store that takes them.

    Args:
        store: Where rows go.
        names: For each parameter the group whose norm is recorded; empty without groups.
        norm_type: The p of the groups' norms.
    """

    def __init__(
        self, store: FileStore | MemoryStore, names: dict[int, str], norm_type: float
    ) -> None:
        self.counts: dict[str, int] = {}
        self.start = 0  # where a series begins that is new in an attempt that continues another
        self._names = names
        self._norm_type = norm_type
        self.waiting: list[Pending] = []  # until the next flush
        self.restart(store)
        _BUFFERS.add(self)

    def restart(self, store: FileStore | MemoryStore) -> None:
        """Begin another attempt, in another store; steps count on."""
        self.store = store
        self._pid = os.getpid()
        self._declared: set[str] = set()
        self._default = ""
        self._written: dict[tuple[str, str], float] = {}
        self._said: dict[str, tuple[object, ...]] = {}
        self._told: dict[tuple[str, str], int] = {}
        self._imposed = False

    def drop(self) -> None:
        """Forget what waits."""
        self.waiting.clear()

    @property
    def n_steps(self) -> int:
        """How many steps were seen, of the series with most of them."""
        return max(self.counts.values(), default=self.start)

    def keep(
        self,
        measured: Measured,
        imposed: float | None,
        lr: float,
        belted: bool,  # noqa: FBT001  called at every step
    ) -> None:
        """Take one step; its values may still be on the device."""
        name = measured.series.name
        step = self.counts[name] = self.counts.get(name, self.start) + 1
        self.waiting.append(Pending(measured, step, imposed, lr, belted))

    def flush(self) -> list[tuple[str, float]]:
        """Read the waiting values in one go and hand the rows to the store.

        Returns:
            (series, norm) of each step that was taken, but not what an engine gave: it may have
            left out the step by itself.
        """
        pending, self.waiting = self.waiting, []
        if not pending:
            return []
        if self._pid != os.getpid():  # a forked child that trains has a store of its own
            self.restart(self.store.branch())
        values = _values(pending)
        self._write(pending, values)
        return [
            (item.measured.series.name, norm)
            for item, norm, skipped in zip(pending, values.norms, values.skipped, strict=True)
            if not skipped and item.measured.series.by != "given"
        ]

    def tell(self, findings: dict[tuple[str, str], Finding], *, last: bool) -> None:
        """Hand findings to the store, each when it is new, when it is sure, and at the end."""
        if self._pid != os.getpid():
            return  # the store is the parent's
        for key, finding in findings.items():
            told = self._told.get(key, 0)
            sure = told < SURE_AFTER <= finding.count
            if finding.count == told or not (told == 0 or sure or last):
                continue
            self._told[key] = finding.count
            line: dict[str, object] = {"finding": finding.kind, "text": finding.text}
            line |= {"site": finding.site, "step": finding.step, "count": finding.count}
            if finding.blocks:
                line["blocks"] = True
            self.store.finding(line)

    def _write(self, pending: Sequence[Pending], values: _Values) -> None:
        several = len(self.counts) > 1
        rows = []
        for item, norm, skipped, each in zip(
            pending, values.norms, values.skipped, values.each, strict=True
        ):
            series = item.measured.series
            name = series.name
            if name not in self._declared:
                self._declare(series, default=not self._declared)
            said = (item.imposed, item.lr, item.measured.asked)
            more = skipped or item.belted or each or several
            if not more and self._said.get(name) == said:
                rows.append(Row(item.step, norm))  # nearly every step
            else:
                self._said[name] = said
                rows.append(Row(item.step, norm, self._extra(item, skipped, each, several)))
        self.store.rows(rows)

    def _extra(
        self,
        item: Pending,
        skipped: bool,  # noqa: FBT001
        each: list[float] | None,
        several: bool,  # noqa: FBT001
    ) -> dict[str, object]:
        """What a row says besides its step and norm."""
        name = item.measured.series.name
        extra: dict[str, object] = {}
        if several and name != self._default:
            extra["series"] = name
        changed = self._written
        for key, number in (
            ("max_norm", item.max_norm),
            ("lr", item.lr),
            ("asked", item.measured.asked if item.measured.asked is not None else math.nan),
        ):
            if number == number and changed.get((name, key)) != number:  # noqa: PLR0124  not nan
                changed[(name, key)] = number
                extra[key] = number
        if (item.imposed is not None) != self._imposed:
            self._imposed = extra["imposed"] = item.imposed is not None
        if skipped:
            extra["skipped"] = True
        if item.belted:
            extra["belted"] = True
        if each:
            extra["groups"] = self._grouped(item.measured.each, each)
        return extra

    def _declare(self, series: Series, *, default: bool) -> None:
        self._declared.add(series.name)
        line: dict[str, object] = {
            "series": series.name,
            "by": series.by,
            "norm_type": series.norm_type,
            "tensors": series.tensors,
            "parameters": series.parameters,
        }
        if default:
            self._default = series.name
            line["default"] = True
        self.store.declare(records.strict(line))

    def _grouped(self, each: EachNorm | None, norms: Sequence[float]) -> dict[str, float]:
        assert each is not None  # noqa: S101  values of each parameter come with their ids
        p = self._norm_type
        parts: dict[str, list[float]] = {}
        for key, norm in zip(each.ids, norms, strict=True):
            parts.setdefault(self._names.get(key, "other"), []).append(norm)
        return {name: float(f"{np.linalg.norm(part, ord=p):.6g}") for name, part in parts.items()}


_BUFFERS: weakref.WeakSet[Buffer] = weakref.WeakSet()


def _drop_in_child() -> None:
    """What waits at a fork is the parent's to write."""
    for buffer in _BUFFERS:
        buffer.drop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_in_child)


def _values(pending: Sequence[Pending]) -> _Values:
    """Bring the waiting values to the host: one read per device, none for the CPU."""
    n = len(pending)
    found = [item.measured for item in pending]
    norms = [m.norm for m in found]
    if all(m.skipped is False and m.each is None for m in found) and set(map(type, norms)) == {
        float
    }:
        return _Values(norms, [False] * n, [None] * n)  # type: ignore[arg-type]
    tensors: list[Tensor] = []
    for m in found:
        if isinstance(m.norm, Tensor):
            tensors.append(m.norm)
        if isinstance(m.skipped, Tensor):
            tensors.append(m.skipped)
        if m.each is not None:
            tensors.append(m.each.norms)
    numbers = iter(_to_host(tensors))
    values = _Values([], [], [])
    for m in found:
        values.norms.append(next(numbers)[0] if isinstance(m.norm, Tensor) else m.norm)
        skipped = bool(next(numbers)[0]) if isinstance(m.skipped, Tensor) else m.skipped
        values.skipped.append(skipped)
        values.each.append(next(numbers) if m.each is not None else None)
    return values


def _to_host(tensors: Sequence[Tensor]) -> list[list[float]]:
    found: list[list[float]] = [[] for _ in tensors]
    by_device: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(i)
    for device, where in by_device.items():
        if device.type == "cpu":  # nothing to wait for
            for i in where:
                found[i] = tensors[i].reshape(-1).tolist()
            continue
        wide = torch.float32 if device.type == "mps" else torch.float64
        flat = torch.cat([tensors[i].detach().reshape(-1).to(wide) for i in where]).tolist()
        start = 0
        for i in where:
            found[i] = flat[start : start + tensors[i].numel()]
            start += tensors[i].numel()
    return found
