"""Every series of gradient norms in a source, for `normtune suggest --list`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from normtune.errors import RecordError
from normtune.records import ClipSide, NormRecord, is_record
from normtune.sources import folders, formats
from normtune.sources.choice import family_of
from normtune.sources.families import Value
from normtune.sources.runs import NOT_COMPUTED
from normtune.sources.streams import Bytes, Progress, unpacked
from normtune.sources.tables import UNKNOWN, Asked, Column, Floats, Reading


@dataclass(frozen=True)
class FoundSeries:
    """One series of gradient norms in a source.

    Attributes:
        key: The name to give as ``--key`` (as ``--series`` in a normtune record).
        points: How many values there are, of all runs in the file together.
        lowest: The smallest finite value, nan where none is finite.
        highest: The largest finite value, nan where none is finite.
        first_step: The first step, None where the log has no steps.
        last_step: The last step.
        clip_side: Whether the values are norms before or after clipping.
        value: What one value stands for.
        path: The file.
        kind: The family of the file.
        whole: Whether its name says a total norm; False for that of a layer, group or loss.
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


def of_files(files: list[Bytes]) -> tuple[FoundSeries, ...]:
    """The series of one file, or of the event files of one run; totals come first."""
    data = files[0]
    if is_record(formats.start_of(data)):
        return _of_record(data)
    reading = formats.reading(files, Asked())
    found = [_found(reading, column) for column in reading.columns.values() if len(column)]
    return tuple(sorted(found, key=lambda item: not item.whole))


def of_folder(folder: Path, progress: Progress | None) -> tuple[FoundSeries, ...]:
    """The series of every source below a folder, the best source first."""
    found: list[FoundSeries] = []
    for candidate in folders.candidates(folder)[: folders.MOST_TRIED]:
        try:
            found += of_files([Bytes(path, str(path), progress) for path in candidate.paths])
        except RecordError:
            continue
    return tuple(found)


def _of_record(data: Bytes) -> tuple[FoundSeries, ...]:
    with unpacked(data) as path:
        first = NormRecord.load(path)
        names = [n.split("'")[1] for n in first.origin.notes if n.startswith("also series '")]
        records = [first, *(NormRecord.load(path, series=name) for name in names)]
    return tuple(_of_one(record, data.name) for record in records)


def _of_one(record: NormRecord, path: str) -> FoundSeries:
    low, high = _range(record.norms)
    first, last = int(record.steps[0]), int(record.steps[-1])
    kind = record.origin.kind
    return FoundSeries(
        record.series, len(record), low, high, first, last, "before", "each step", path, kind
    )


def _found(reading: Reading, column: Column) -> FoundSeries:
    family = family_of(column)
    low, high = column.lowest, column.highest
    first, last = column.first, column.last
    if column.keep:
        steps, values = column.arrays()
        low, high = _range(values)
        known = np.zeros(0) if steps is None else steps[steps != UNKNOWN]
        first, last = (int(known[0]), int(known[-1])) if len(known) else (None, None)
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


def _range(values: Floats) -> tuple[float, float]:
    finite = values[np.isfinite(values) & (values != NOT_COMPUTED)]
    return (float(finite.min()), float(finite.max())) if len(finite) else (math.nan, math.nan)
