"""Reads the gradient norms that other tools logged: finds the right reader by content."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from normtune.errors import RecordError
from normtune.records import NormRecord, is_record
from normtune.sources import folders, formats, listing
from normtune.sources.choice import AmbiguousError, choose
from normtune.sources.listing import FoundSeries
from normtune.sources.streams import Bytes, Progress, on_disk, unpacked
from normtune.sources.tables import Asked
from normtune.sources.taking import describe, record

__all__ = ["FoundSeries", "describe", "list_series", "read"]


def read(
    source: str | os.PathLike[str] | BinaryIO,
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
            0 for all in the order of the file); without it the last.
        series: Which series of a normtune record.
        progress: Told the bytes read so far and all bytes of each file.

    Returns:
        The norms, with where they come from.

    Raises:
        RecordError: If there are no norms, or several and no way to tell which is the total.
    """
    wanted = _Wanted(key, attempt, series)
    if isinstance(source, str | os.PathLike) and Path(source).is_dir():
        return _read_folder(Path(source), wanted, progress)
    with on_disk(source, progress) as data:
        return _read_files([data], wanted)


def list_series(
    source: str | os.PathLike[str] | BinaryIO, *, progress: Progress | None = None
) -> tuple[FoundSeries, ...]:
    """Every series of gradient norms in a file, a folder or a stream; total norms come first.

    Args:
        source: A file, a folder, or a binary stream such as ``sys.stdin.buffer``.
        progress: Told the bytes read so far and all bytes of each file.

    Returns:
        One entry a series; none for a source without norms.

    Raises:
        RecordError: If the source cannot be read.
    """
    if isinstance(source, str | os.PathLike) and Path(source).is_dir():
        return listing.of_folder(Path(source), progress)
    with on_disk(source, progress) as data:
        return listing.of_files([data])


@dataclass(frozen=True)
class _Wanted:
    key: str | None
    attempt: int | None
    series: str | None


def _read_files(files: list[Bytes], wanted: _Wanted) -> NormRecord:
    """Read one file, or the event files of one run."""
    data = files[0]
    if is_record(formats.start_of(data)):
        return _read_own(data, wanted)
    if wanted.series is not None:
        message = f"{data.name} is no normtune record and has no series; name the norm with --key"
        raise RecordError(message)
    reading = formats.reading(files, Asked(wanted.key))
    return record(reading, choose(reading, wanted.key), wanted.attempt, data)


def _read_own(data: Bytes, wanted: _Wanted) -> NormRecord:
    with unpacked(data) as path:
        try:
            own = NormRecord.load(path, series=wanted.series or wanted.key, attempt=wanted.attempt)
        except RecordError as error:
            raise RecordError(str(error).replace(str(path), data.name)) from None
    return replace(own, origin=replace(own.origin, path=data.name))


def _read_folder(folder: Path, wanted: _Wanted, progress: Progress | None) -> NormRecord:
    """Read the best source of a folder; one that only lacks a --key is not passed over."""
    found = folders.candidates(folder, wanted.key)
    refusals: list[str] = []
    for i, candidate in enumerate(found[: folders.MOST_TRIED]):
        try:
            taken = _read_files([Bytes(p, str(p), progress) for p in candidate.paths], wanted)
        except AmbiguousError:
            raise
        except RecordError as error:
            refusals.append(str(error))
            continue
        rest = [str(other.paths[0].relative_to(folder)) for other in found[i + 1 :]]
        notes = (*taken.origin.notes, *folders.also(rest))
        return replace(taken, origin=replace(taken.origin, notes=notes))
    raise RecordError(folders.refusal(folder, refusals))
