"""Which of the columns of a file is the total gradient norm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from normtune.errors import RecordError
from normtune.sources.families import UNKNOWN, Family
from normtune.sources.tables import Column, Reading

SHOWN = 8


class AmbiguousError(RecordError):
    """Several gradient norms of which the user must pick one."""


def choose(reading: Reading, key: str | None) -> Column:
    """The column that the user asked for, or else the only total norm.

    Raises:
        RecordError: If there is none, or more than one.
    """
    present = [column for column in reading.columns.values() if len(column) or column.odd]
    if key is not None:
        return _asked(reading, present, key)
    for role in ("before", "total", "weak", "after", "epoch"):
        found = [column for column in present if column.role == role]
        if found and any(len(column) for column in found):
            found = [column for column in found if len(column)]
        found = _distinct(found)
        if len(found) == 1:
            return found[0]
        if found:
            raise AmbiguousError(_several(reading, found))
    parts = [column for column in present if column.role == "part"]
    if parts:
        raise RecordError(_only_parts(reading, parts))
    raise RecordError(no_norms(reading))


def family_of(column: Column) -> Family:
    """The framework of a column; a name that tells the side of clipping overrules it."""
    family = column.family or UNKNOWN
    if column.role in ("before", "after"):
        return replace(family, side=column.role)
    if column.role == "epoch":
        return replace(family, value="mean of window")
    return family


def no_norms(reading: Reading) -> str:
    """Why nothing can be read, and where norms may be."""
    hint = f": {reading.hint}" if reading.hint else _where_norms_are(reading.kind)
    return f"{reading.path} ({reading.kind}) holds no gradient norm{hint}"


def _where_norms_are(kind: str) -> str:
    if kind == "trainer_state.json":
        return ": transformers writes grad_norm since 4.38; record the next run with NormRecorder"
    return "; --list shows what it has, --key names another column"


def _asked(reading: Reading, present: Sequence[Column], key: str) -> Column:
    low = key.lower()
    for found in (
        [c for c in present if c.key == key],
        [c for c in present if c.key.lower() == low],
        [c for c in present if c.key.lower().endswith("/" + low)],
    ):
        if len(found) == 1:
            return found[0]
        if found:
            raise AmbiguousError(_several(reading, found))
    known = [column for column in present if column.role != "other"]
    has = f"; it has {_names(known)}" if known else ""
    message = f"{reading.path} has no values under the key {key!r}{has}"
    raise RecordError(message)


def _distinct(columns: Sequence[Column]) -> list[Column]:
    """The columns but for those that hold the same values under a second name."""
    kept: list[Column] = []
    for column in columns:
        if not any(_same(column, other) for other in kept):
            kept.append(column)
    return kept


def _same(one: Column, other: Column) -> bool:
    if len(one) != len(other) or not (one.keep and other.keep):
        return False
    return np.array_equal(one.arrays()[1], other.arrays()[1], equal_nan=True)


def _several(reading: Reading, columns: Sequence[Column]) -> str:
    return (
        f"{reading.path} holds {len(columns)} gradient norms and does not say which is the total: "
        f"{_names(columns)}; pick one with --key"
    )


def _only_parts(reading: Reading, parts: Sequence[Column]) -> str:
    if len(parts) > 1:
        return (
            f"{reading.path} holds {len(parts)} gradient norms of which none is named as the "
            f"total: {_names(parts)}; pick with --key what your clip call is given"
        )
    return (
        f"{reading.path} holds the norm of one group of parameters but no total norm: "
        f"{_names(parts)}; "
        "log the total, or take it with --key if it is what you clip"
    )


def _names(columns: Iterable[Column]) -> str:
    names = [f"{column.key[:60]!r}" for column in columns]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
