"""Rows of named values, as JSON, W&B and TensorBoard hold them, sorted into columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from normtune.sources.families import family
from normtune.sources.numbers import is_blank, number, whole
from normtune.sources.tables import Asked, Column

STEP_KEYS = (
    "train/global_step",
    "trainer/global_step",
    "training/global_step",
    "step",
    "global_step",
    "_step",
    "num_updates",
    "train/step",
    "train_step",
    "iteration",
    "iter",
    "global_step/max_steps",
    "training_iteration",
    "update",
    "updates",
    "n_updates",
    "num_steps",
    "steps",
    "iterations",
    "current_steps",
    "it",
    "optim_step",
    "optimizer_step",
    "batch",
    "batch_idx",
    "training/iteration",
)
DEEPEST = 8
MOST_NAMES = 10_000  # names remembered; a log with more of them is no log of scalars


class EpochClock:
    """Step numbers that restart at each epoch, made to go on.

    >>> clock = EpochClock()
    >>> [clock.step(epoch, it) for epoch, it in [(1, 50), (1, 100), (2, 50), (2, 100)]]
    [50, 100, 150, 200]
    """

    def __init__(self) -> None:
        self._epoch = -1.0
        self._last = 0
        self._offset = 0

    def step(self, epoch: float, it: int) -> int:
        """The step number of iteration `it` of `epoch`."""
        if epoch < self._epoch:
            self._offset = 0
        elif epoch > self._epoch and it <= self._last:
            self._offset += self._last
        self._epoch, self._last = epoch, it
        return self._offset + it

    def passes(self, epoch: float, rising: Sequence[int]) -> bool:
        """Whether these rising steps go on from the last one as they are, up to `epoch`."""
        if self._offset or rising[0] < self._last or epoch < self._epoch:
            return False
        self._epoch, self._last = epoch, rising[-1]
        return True


class Rows:
    """Takes rows one after another.

    Args:
        asked: What the user wants.
    """

    def __init__(self, asked: Asked) -> None:
        self.columns: dict[str, Column] = {}
        self.beside: set[str] = set()
        self._asked = asked
        self._ignored: set[str] = set()
        self._shapes: dict[tuple[str, ...], tuple[bool, list[str]]] = {}
        self._step_key = ""
        self._clock = EpochClock()

    def take(self, row: Mapping[str, Any]) -> None:
        """Sort one row into the columns."""
        names = tuple(row)
        shape = self._shapes.get(names)
        if shape is None:
            shape = self._shape(names, row)
        nested, found = shape
        if nested:
            row = dict(_flat(row))
            found = [key for key in row if key not in self._ignored and self._known(key)]
        if not found:
            return
        step = self._step(row)
        for key in found:
            cell = row.get(key)
            if type(cell) is float:
                self.columns[key].add(step, cell)
            else:
                self._add(self.columns[key], step, cell)

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Sort rows into the columns."""
        for row in rows:
            self.take(row)

    def _shape(self, names: tuple[str, ...], row: Mapping[str, Any]) -> tuple[bool, list[str]]:
        """Whether rows of these names hold rows themselves, and their gradient norms."""
        nested = any(isinstance(value, dict) for value in row.values())
        found = [] if nested else [key for key in row if self._known(key)]
        if len(self._shapes) < MOST_NAMES and not nested:
            self._shapes[names] = (nested, found)
        return nested, found

    def name(self) -> None:
        """Give every column the framework that the names beside it tell."""
        for column in self.columns.values():
            column.family = column.family or family(column.key, self.beside)

    def _known(self, key: str) -> bool:
        if key in self.columns:
            return True
        column = self._asked.column(key) if len(self.beside) < MOST_NAMES else None
        if len(self.beside) < MOST_NAMES:
            self.beside.add(key)
            self._ignored.add(key)
        if column is None:
            return False
        self._ignored.discard(key)
        self.columns[key] = column
        return True

    def _add(self, column: Column, step: int | None, cell: object) -> None:
        value = number(cell)
        if value is not None:
            column.add(step, value)
        elif not is_blank(cell):
            column.refuse(cell)

    def _step(self, row: Mapping[str, Any]) -> int | None:
        step = row.get(self._step_key) if self._step_key else None
        if type(step) is not int:
            step = whole(step) if step is not None else None
        if step is None:
            step = self._first_step(row)
        epoch = row.get("epoch")
        if epoch is None or step is None or type(epoch) not in (int, float):
            return step
        return self._clock.step(epoch, step)

    def _first_step(self, row: Mapping[str, Any]) -> int | None:
        for key in STEP_KEYS:
            step = whole(row.get(key))
            if step is not None:
                if STEP_KEYS.index(key) < _rank(self._step_key):
                    self._step_key = key
                return step
        return None


def _rank(key: str) -> int:
    return STEP_KEYS.index(key) if key else len(STEP_KEYS)


def _flat(row: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    items: Iterable[tuple[str, Any]] = row.items()
    for key, value in items:
        if isinstance(value, dict) and depth < DEEPEST:
            yield from _flat(value, f"{prefix}{key}/", depth + 1)
        else:
            yield f"{prefix}{key}", value
