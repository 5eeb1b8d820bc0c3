"""A chosen column as a `NormRecord` that says where its values come from."""

from __future__ import annotations

import math
from pathlib import PurePath

import numpy as np

from normtune.errors import RecordError
from normtune.records import SCHEDULE, Finding, NormRecord, Origin
from normtune.sources import clipping
from normtune.sources.choice import family_of, no_norms
from normtune.sources.families import Family, Value
from normtune.sources.other_ranks import several_values
from normtune.sources.runs import Series, cadence, pick, series
from normtune.sources.streams import Bytes
from normtune.sources.tables import Column, Reading

_SIDES = {"before": "pre-clip", "after": "post-clip", "unknown": "clip side not known"}
_VALUES = {"last of window": "last step of each window", "mean of window": "mean of each window"}


def record(reading: Reading, column: Column, attempt: int | None, data: Bytes) -> NormRecord:
    """The record of one run of a column.

    Raises:
        RecordError: If the column holds no numbers, or no such run.
    """
    if not len(column) and not column.odd:
        raise RecordError(no_norms(reading))
    chosen = pick(series(column, reading.path), attempt, reading.path)
    family = family_of(column)
    stated, where = _max_norm(reading, data)
    value, odd = _value(chosen, family)
    said = [f"{_stated(stated)} in {where}"] if where else []
    notes = (*chosen.notes, *odd, *_others(reading, column), *reading.notes, *_torn(reading, data))
    origin = Origin(reading.path, reading.kind, column.key, family.side, value, (*notes, *said))
    metadata: dict[str, object] = {"asked_max_norm": stated, "asked_in": where} if where else {}
    if chosen.steps is None:
        metadata["steps"] = "not logged"
    elif reading.schedule > 0:
        metadata[SCHEDULE] = reading.schedule
    return _plain(chosen, column.key, metadata, origin, _ranks_differ(reading, chosen))


def _ranks_differ(reading: Reading, chosen: Series) -> tuple[Finding, ...]:
    others = reading.other_ranks
    text = others.differ(chosen.steps, chosen.norms) if others is not None else ""
    text = text or several_values(chosen.steps, chosen.norms)
    return (Finding("ranks-differ", text),) if text else ()


def describe(taken: NormRecord) -> str:
    """What was taken, as one sentence.

    Args:
        taken: What `read` gave.

    Returns:
        The key, the file, the number of values, their steps, and the side of clipping.

    >>> origin = Origin("out/train.log", "text log", "gnorm", "before", "mean of window")
    >>> describe(NormRecord.of([1.0, 2.0], steps=[10, 20], origin=origin))
    'gnorm from train.log, 2 values, one per 10 steps, pre-clip, mean of each window'
    """
    origin = taken.origin
    gap, _ = cadence(taken.steps)
    every = f"one per {gap} steps" if gap > 1 else "one per step"
    parts = [
        f"{origin.key} from {PurePath(origin.path).name or origin.kind}",
        f"{len(taken)} value{'s' * (len(taken) != 1)}",
        "steps not logged" if taken.metadata.get("steps") == "not logged" else every,
        _SIDES[origin.clip_side],
    ]
    return ", ".join([*parts, *([_VALUES[origin.value]] if origin.value in _VALUES else [])])


def _value(chosen: Series, family: Family) -> tuple[Value, list[str]]:
    """What one value stands for: with one a step, the last of a window is each step."""
    gap, notes = cadence(chosen.steps, mean=family.value == "mean of window")
    every = chosen.steps is not None and gap == 1 and family.value == "last of window"
    return "each step" if every else family.value, notes


def _plain(
    chosen: Series,
    key: str,
    metadata: dict[str, object],
    origin: Origin,
    findings: tuple[Finding, ...],
) -> NormRecord:
    """A record whose unknown columns take no memory: ten million steps must stay small."""
    n = len(chosen.norms)
    unknown = np.broadcast_to(np.float64(np.nan), (n,))
    no = np.broadcast_to(np.False_, (n,))
    return NormRecord(
        steps=np.arange(1, n + 1) if chosen.steps is None else chosen.steps,
        norms=chosen.norms,
        max_norm=unknown,
        lr=unknown,
        skipped=no,
        belted=no,
        series=key,
        metadata=metadata,
        findings=findings,
        origin=origin,
    )


def _max_norm(reading: Reading, data: Bytes) -> tuple[float, str]:
    if not math.isnan(reading.max_norm):
        return reading.max_norm, reading.stated
    if data.copied:
        return math.nan, ""
    stated, name = clipping.beside(data.path)
    return stated, f"{name} beside it" if name else ""


def _stated(max_norm: float) -> str:
    finite = math.isfinite(max_norm)
    return f"max_norm {max_norm:g} is stated" if finite else "clipping is off as stated"


def _others(reading: Reading, taken: Column) -> list[str]:
    """What else the file holds, and what the name of the taken column leaves open."""
    rest = [c for c in reading.columns.values() if c is not taken and len(c) and c.role != "other"]
    totals = [f"{c.key[:60]} ({len(c)} values)" for c in rest if c.role != "part"]
    parts = [c for c in rest if c.role == "part"]
    notes = [f"also in this file: {', '.join(totals[:4])}"] if totals else []
    if parts:
        such = parts[0].key[:60]
        notes.append(f"also {len(parts)} norms of layers, groups or losses, such as {such}")
    if taken.role == "part":
        notes.append(
            "not named as a total: a max_norm from it is for a clip call on the same parameters"
        )
    if taken.role == "weak":
        notes.append(f"taken for the gradient norm, though its name says only {taken.key!r}")
    return notes


def _torn(reading: Reading, data: Bytes) -> list[str]:
    lines = f"{reading.torn} torn line{'s' * (reading.torn > 1)} skipped"
    notes = [lines] if reading.torn else []
    return [*notes, "the compressed file ends early"] if data.torn else notes
