"""Reads the gradient norms that other tools logged: finds the right reader by content."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import BinaryIO, Literal

import numpy as np

from normtune.errors import RecordError
from normtune.records import ClipSide, NormRecord, Origin, is_record
from normtune.sources import clipping, folders, formats
from normtune.sources.choice import choose, family_of, no_norms
from normtune.sources.runs import cadence, pick
from normtune.sources.runs import series as as_series
from normtune.sources.streams import Bytes, Progress, on_disk, unpacked
from normtune.sources.tables import Asked, Column, Reading

__all__ = ["FoundSeries", "describe", "list_series", "read"]

Value = Literal["each step", "last of window", "mean of window", "unknown"]
Source = str | os.PathLike[str] | BinaryIO


@dataclass(frozen=True)
class FoundSeries:
    """One series of gradient norms in a source.

    Attributes:
        key: The name to give as ``--key`` (as ``--series`` in a normtune record).
        points: How many values there are.
        lowest: The smallest value, nan where none is finite.
        highest: The largest finite value, nan where none is finite.
        first_step: The first step, None where the log has no steps.
        last_step: The last step.
        clip_side: Whether the values are norms before or after clipping.
        value: What one value stands for.
        path: The file.
        kind: The family of the file.
        whole: Whether it is a total norm; False for the norm of a layer or group.
    """

    key: str
    points: int
    lowest: float
    highest: float
    first_step: int | None
    last_step: int | None
    clip_side: ClipSide
    value: Value
    path: str
    kind: str
    whole: bool = True


def read(
    source: Source,
    *,
    key: str | None = None,
    attempt: int | None = None,
    series: str | None = None,
    progress: Progress | None = None,
) -> NormRecord:
    """Read the gradient norms of one run from a log, a folder of logs, or a normtune record.

    Args:
        source: A file, a folder, or a binary stream such as ``sys.stdin.buffer``.
        key: The key, column or tag of the norm; without it the only total norm there is.
        attempt: Which run of a file that holds several, counted from 1 (negative from the end,
            0 for all); without it the last.
        series: Which series of a normtune record.
        progress: Told the bytes read so far and all bytes of each file.

    Raises:
        RecordError: If there are no norms, or several and no way to tell which is the total.
    """
    if isinstance(source, str | os.PathLike) and Path(source).is_dir():
        return _read_folder(
            Path(source), key=key, attempt=attempt, series=series, progress=progress
        )
    with on_disk(source, progress) as data:
        return _read_files([data], key=key, attempt=attempt, series=series)


def list_series(source: Source, *, progress: Progress | None = None) -> tuple[FoundSeries, ...]:
    """Every series of gradient norms in a file, a folder or a stream; total norms come first.

    Raises:
        RecordError: If the source cannot be read; one without norms gives an empty tuple.
    """
    if isinstance(source, str | os.PathLike) and Path(source).is_dir():
        return _list_folder(Path(source), progress)
    with on_disk(source, progress) as data:
        return _list_files([data])


def describe(record: NormRecord) -> str:
    """What was taken, as one sentence.

    >>> record = NormRecord.of([1.0, 2.0], steps=[10, 20], origin=Origin("out/train.log", "text log", "gnorm"))
    >>> describe(record)
    'gnorm from train.log, 2 values, one per 10 steps, pre-clip'
    """
    origin = record.origin
    gap, _ = cadence(record.steps)
    side = {"before": "pre-clip", "after": "post-clip", "unknown": "clip side not known"}
    value = {"last of window": "last step of each window", "mean of window": "mean of each window"}
    parts = [
        f"{origin.key} from {PurePath(origin.path).name or origin.kind}",
        f"{len(record)} value{'s' * (len(record) != 1)}",
        f"one per {gap} steps" if gap > 1 else "one per step",
        side[origin.clip_side],
    ]
    if origin.value in value:
        parts.append(value[origin.value])
    return ", ".join(parts)


# --- one file (or the event files of one run) ----------------------------------------------------


def _read_files(
    files: list[Bytes], *, key: str | None, attempt: int | None, series: str | None
) -> NormRecord:
    data = files[0]
    if is_record(formats.start_of(data)):
        return _own(data, series=series or key, attempt=attempt)
    reading = formats.reading(files, Asked(key))
    if series is not None:
        message = f"{data.name} is no normtune record and has no series {series!r}; use --key"
        raise RecordError(message)
    return _record(reading, choose(reading, key), attempt, data)


def _own(data: Bytes, *, series: str | None, attempt: int | None) -> NormRecord:
    from dataclasses import replace

    with unpacked(data) as path:
        try:
            record = NormRecord.load(path, series=series, attempt=attempt)
        except RecordError as error:
            raise RecordError(str(error).replace(str(path), data.name)) from None
    return replace(record, origin=replace(record.origin, path=data.name))


def _record(reading: Reading, column: Column, attempt: int | None, data: Bytes) -> NormRecord:
    if not len(column) and not column.odd:
        raise RecordError(no_norms(reading))
    chosen = pick(as_series(column, reading.path), attempt, reading.path)
    family = family_of(column)
    gap, odd = cadence(chosen.steps, mean=family.value == "mean of window")
    stated, where = _max_norm(reading, data)
    value: Value = "each step" if gap == 1 and family.value == "last of window" else family.value
    notes = [*chosen.notes, *odd, *_others(reading, column), *reading.notes, *_torn(reading, data)]
    if where:
        notes.append(f"{_stated(stated)} in {where}")
    origin = Origin(reading.path, reading.kind, column.key, family.side, value, tuple(notes))
    metadata = {} if math.isnan(stated) else {"asked_max_norm": stated, "asked_in": where}
    return _plain(chosen.norms, chosen.steps, column.key, metadata, origin)


def _plain(
    norms: np.ndarray[tuple[int], np.dtype[np.float64]],
    steps: np.ndarray[tuple[int], np.dtype[np.int64]] | None,
    key: str,
    metadata: dict[str, object],
    origin: Origin,
) -> NormRecord:
    """A record whose unknown columns take no memory: ten million steps must stay small."""
    n = len(norms)
    unknown = np.broadcast_to(np.float64(np.nan), (n,))
    no = np.broadcast_to(np.False_, (n,))
    return NormRecord(
        steps=np.arange(1, n + 1) if steps is None else steps,
        norms=norms,
        max_norm=unknown,
        lr=unknown,
        skipped=no,
        belted=no,
        series=key,
        metadata=metadata,
        origin=origin,
    )


def _max_norm(reading: Reading, data: Bytes) -> tuple[float, str]:
    if not math.isnan(reading.max_norm):
        return reading.max_norm, reading.stated
    stated, name = clipping.beside(data.path)
    return stated, f"{name} beside it" if name else ""


def _stated(max_norm: float) -> str:
    return (
        f"max_norm {max_norm:g} is stated"
        if math.isfinite(max_norm)
        else "clipping is off as stated"
    )


def _others(reading: Reading, taken: Column) -> list[str]:
    """What else the file holds, in one sentence."""
    others = [
        c for c in reading.columns.values() if c is not taken and len(c) and c.role != "other"
    ]
    totals = [f"{c.key} ({len(c)} values)" for c in others if c.role != "part"]
    parts = [c for c in others if c.role == "part"]
    notes = [f"also in this file: {', '.join(totals[:4])}"] if totals else []
    if parts:
        notes.append(f"also {len(parts)} norms of layers or groups, such as {parts[0].key[:60]}")
    if taken.role == "part":
        notes.append(
            "this is the norm of a part of the parameters: a max_norm for a clip call on that part only"
        )
    if taken.role == "weak":
        notes.append(f"taken for the gradient norm, though its name says only {taken.key!r}")
    return notes


def _torn(reading: Reading, data: Bytes) -> list[str]:
    notes = [f"{reading.torn} torn line{'s' * (reading.torn > 1)} skipped"] if reading.torn else []
    return [*notes, "the compressed file ends early"] if data.torn else notes


def _list_files(files: list[Bytes]) -> tuple[FoundSeries, ...]:
    data = files[0]
    if is_record(formats.start_of(data)):
        return _list_own(data)
    reading = formats.reading(files, Asked())
    found = [_found(reading, column) for column in reading.columns.values() if len(column)]
    return tuple(sorted(found, key=lambda item: not item.whole))


def _list_own(data: Bytes) -> tuple[FoundSeries, ...]:
    with unpacked(data) as path:
        first = NormRecord.load(path)
        others = [
            note.split("'")[1] for note in first.origin.notes if note.startswith("also series")
        ]
        records = [first, *(NormRecord.load(path, series=name) for name in others)]
    return tuple(_found_own(record, data.name) for record in records)


def _found_own(record: NormRecord, path: str) -> FoundSeries:
    low, high = _range(record.norms)
    first, last = int(record.steps[0]), int(record.steps[-1])
    kind = record.origin.kind
    return FoundSeries(
        record.series, len(record), low, high, first, last, "before", "each step", path, kind
    )


def _found(reading: Reading, column: Column) -> FoundSeries:
    family = family_of(column)
    if column.keep:
        steps, values = column.arrays()
        low, high = _range(values)
        first, last = (None, None) if steps is None else (int(steps[0]), int(steps[-1]))
    else:
        low, high = column.lowest, column.highest
        first, last = column.first, column.last
    return FoundSeries(
        column.key,
        len(column),
        low if math.isfinite(low) else math.nan,
        high if math.isfinite(high) else math.nan,
        first,
        last,
        family.side,
        family.value,
        reading.path,
        reading.kind,
        column.role != "part",
    )


def _range(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if len(finite) else (math.nan, math.nan)


# --- folders -------------------------------------------------------------------------------------


def _read_folder(
    folder: Path,
    *,
    key: str | None,
    attempt: int | None,
    series: str | None,
    progress: Progress | None,
) -> NormRecord:
    from dataclasses import replace

    candidates = folders.candidates(folder)
    refusals: list[str] = []
    for i, candidate in enumerate(candidates[: folders.MOST_TRIED]):
        files = [Bytes(path, str(path), progress) for path in candidate.paths]
        try:
            record = _read_files(files, key=key, attempt=attempt, series=series)
        except RecordError as error:
            refusals.append(str(error))
            continue
        rest = [str(other.paths[0].relative_to(folder)) for other in candidates[i + 1 :]]
        notes = (*record.origin.notes, *folders.also(rest))
        return replace(record, origin=replace(record.origin, notes=notes))
    raise RecordError(folders.refusal(folder, candidates, refusals))


def _list_folder(folder: Path, progress: Progress | None) -> tuple[FoundSeries, ...]:
    found: list[FoundSeries] = []
    for candidate in folders.candidates(folder)[: folders.MOST_TRIED]:
        try:
            found += _list_files([Bytes(path, str(path), progress) for path in candidate.paths])
        except RecordError:
            continue
    return tuple(found)
