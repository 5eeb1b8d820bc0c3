"""What a reader found in one file: columns of values that grow while it is read."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from normtune.sources.families import Family
from normtune.sources.keys import Role, role
from normtune.sources.other_ranks import OtherRanks

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
MOST_UNKNOWN = 0.1  # share of values without a step in a log that has steps
UNKNOWN = -(1 << 63)  # the step of a value whose step is not logged


class Column:
    """The values under one name; a column that nobody asked for keeps its summary only.

    Args:
        key: Its name.
        keep: Whether the values are kept.
        role: What its name says; without it the name decides.
        family: The framework that writes such a value, where the reader knows it.
    """

    __slots__ = (
        "breaks",
        "family",
        "first",
        "highest",
        "keep",
        "key",
        "last",
        "lowest",
        "odd",
        "points",
        "role",
        "sample",
        "steps",
        "values",
    )

    def __init__(
        self,
        key: str,
        *,
        keep: bool = True,
        role_: Role | None = None,
        family: Family | None = None,
    ) -> None:
        self.key = key
        self.keep = keep
        self.role: Role = role_ or role(key)
        self.family = family
        self.steps = array("q")
        self.values = array("d")
        self.breaks: list[int] = []
        self.points = 0
        self.odd = 0  # cells that hold text instead of a number
        self.sample = ""
        self.lowest, self.highest = math.inf, -math.inf
        self.first: int | None = None
        self.last: int | None = None

    def add(self, step: int | None, value: float) -> None:
        """Append one value."""
        if self.keep:
            try:
                self.steps.append(UNKNOWN if step is None else step)
            except OverflowError:  # no step number is as large
                self.steps.append(UNKNOWN)
            self.values.append(value)
            return
        self.points += 1
        self.lowest = min(self.lowest, value)
        if math.inf > value > self.highest:
            self.highest = value
        if self.first is None:
            self.first = step
        self.last = step

    def extend(self, steps: Sequence[int], values: Sequence[float]) -> None:
        """Append values."""
        if self.keep:
            self.steps.extend(array("q", steps))
            self.values.extend(array("d", values))
            return
        for step, value in zip(steps, values, strict=True):
            self.add(step, value)

    def refuse(self, cell: object) -> None:
        """Count a cell that is no number."""
        self.odd += 1
        self.sample = self.sample or str(cell)[:40]

    def __len__(self) -> int:
        return len(self.values) if self.keep else self.points

    def arrays(self) -> tuple[Integers | None, Floats]:
        """Steps and values, without a copy; a step that is not known is UNKNOWN.

        Steps are None where the log has none, or writes many of them rounded (2K).
        """
        steps = np.frombuffer(self.steps, dtype=np.int64) if self.steps else np.zeros(0, np.int64)
        values = np.frombuffer(self.values, dtype=np.float64) if self.values else np.zeros(0)
        few = np.count_nonzero(steps == UNKNOWN) <= MOST_UNKNOWN * len(steps)
        return (steps if few else None), values


@dataclass
class Reading:
    """All that a reader found in one file.

    Attributes:
        path: What the user calls the file.
        kind: The family of the file.
        columns: The gradient norms in it, by name.
        max_norm: The max_norm that the log states; inf where it says off, nan where it is silent.
        stated: Where it states it.
        notes: Sentences on what was left out.
        hint: What to tell a user whose file holds no norms.
        torn: Lines or records that could not be read.
        looked: Rows that were searched for a max_norm.
        schedule: Steps that the whole training was to take; nan where the log is silent.
        other_ranks: What lines of other ranks told, which were not taken.
    """

    path: str
    kind: str
    columns: dict[str, Column] = field(default_factory=dict)
    max_norm: float = math.nan
    stated: str = ""
    notes: list[str] = field(default_factory=list)
    hint: str = ""
    torn: int = 0
    looked: int = 0
    schedule: float = math.nan
    other_ranks: OtherRanks | None = None


@dataclass(frozen=True)
class Asked:
    """What the user wants of a file: one key, or whatever is the total norm."""

    key: str | None = None

    def matches(self, name: str) -> bool:
        """Whether `name` is the key that the user asked for."""
        if self.key is None:
            return False
        wanted, given = self.key.lower(), name.lower()
        return given == wanted or given.endswith("/" + wanted)

    def column(
        self, name: str, *, role_: Role | None = None, family: Family | None = None
    ) -> Column | None:
        """A column for `name`, or None where it is no gradient norm and was not asked for."""
        known = role_ or role(name)
        wanted = self.matches(name)
        if known == "other" and not wanted:
            return None
        keep = wanted or (self.key is None and known != "part")
        return Column(name, keep=keep, role_=known, family=family)
