"""A column as one run's series: copies dropped, runs told apart, the cadence put in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from normtune.errors import RecordError
from normtune.sources.tables import UNKNOWN, Column, Floats, Integers

CHUNK = 1 << 20
FURTHEST_COPY = 64  # rows: so many ranks or loggers may print one line each
NOT_COMPUTED = -1.0  # lingua's sentinel


@dataclass
class Series:
    """The values of one column, in the order of the file.

    Attributes:
        steps: Step numbers, None where the log has none.
        norms: The values.
        starts: Where each run begins; the first is 0.
        notes: Sentences on what was left out and what is odd.
    """

    steps: Integers | None
    norms: Floats
    starts: list[int] = field(default_factory=lambda: [0])
    notes: list[str] = field(default_factory=list)


def series(column: Column, where: str) -> Series:
    """Turn a column into a series.

    Raises:
        RecordError: If its cells are text, or negative numbers.
    """
    if column.odd > len(column):
        message = (
            f"{column.key} in {where} holds text such as {column.sample!r}, not numbers; "
            "choose another key, --list shows them"
        )
        raise RecordError(message)
    steps, norms = column.arrays()
    found = Series(steps, norms, sorted({0, *column.breaks}))
    if column.odd:
        found.notes.append(f"{column.odd} cells of text left out, such as {column.sample!r}")
    _drop_not_computed(found, column.key, where)
    _drop_copies(found)
    _fill_unknown(found)
    _tell_runs_apart(found)
    return found


def pick(found: Series, attempt: int | None, where: str) -> Series:
    """The values of one run of the file: the last, the asked one, or with 0 all.

    Raises:
        RecordError: If there is no such run.
    """
    n = len(found.starts)
    if attempt is None:
        attempt = n
    if not -n <= attempt <= n:
        message = (
            f"attempt must lie in 1..{n} (0 for all) but got {attempt}: {where} holds {_runs(n)}"
        )
        raise RecordError(message)
    notes = list(found.notes)
    if n > 1:
        ends = [*found.starts[1:], len(found.norms)]
        sizes = [end - start for start, end in zip(found.starts, ends, strict=True)]
        taken = (
            "all are taken"
            if attempt == 0
            else f"run {attempt if attempt > 0 else n + 1 + attempt} is taken"
        )
        notes.append(
            f"several runs or repeated steps: {_runs(n)} in the file with {_listed(sizes)} values, "
            f"{taken}; --attempt picks"
        )
    if attempt == 0 or n == 1:
        return Series(found.steps, found.norms, found.starts, notes)
    chosen = attempt - 1 if attempt > 0 else n + attempt
    end = [*found.starts[1:], len(found.norms)][chosen]
    part = slice(found.starts[chosen], end)
    steps = None if found.steps is None else found.steps[part]
    return Series(steps, found.norms[part], [0], notes)


def cadence(steps: Integers | None, *, mean: bool = False) -> tuple[int, list[str]]:
    """How many steps lie between two values, and what is to be said about it.

    Args:
        steps: The step numbers, None where the log has none.
        mean: Whether each value is the mean of the steps since the one before.
    """
    if steps is None:
        return 1, ["the log has no step numbers: its values are counted from 1"]
    gaps = gap_counts(steps)
    if not gaps:
        return 1, []
    usual = _median(gaps)
    notes = [f"a thin sample: one value in {usual} steps"] if usual > 1 and not mean else []
    if sum(gaps.values()) - gaps[usual] > 0.1 * sum(gaps.values()):
        notes.append(f"uneven cadence: {min(gaps)} to {max(gaps)} steps between values")
    repeated = 0 if is_rising(steps) else len(steps) - len(np.unique(steps))
    if repeated:
        notes.append(
            f"several runs or repeated steps: {repeated} steps occur again, all are counted"
        )
    return usual, notes


def is_rising(steps: Integers) -> bool:
    """Whether every step is larger than the one before."""
    return bool(np.all(steps[1:] > steps[:-1]))


def gap_counts(steps: Integers) -> Counter[int]:
    """How often each gap between steps occurs, backward ones left out; in little memory."""
    counts: Counter[int] = Counter()
    for start in range(0, len(steps) - 1, CHUNK):
        gaps, times = np.unique(np.diff(steps[start : start + CHUNK + 1]), return_counts=True)
        for gap, n in zip(gaps[gaps > 0].tolist(), times[gaps > 0].tolist(), strict=True):
            counts[gap] += n
    return counts


def _median(counts: Counter[int]) -> int:
    """The gap in the middle; of two the smaller."""
    left = (sum(counts.values()) + 1) // 2
    for gap in sorted(counts):
        left -= counts[gap]
        if left <= 0:
            return gap
    return 1


def _drop_not_computed(found: Series, key: str, where: str) -> None:
    negative = found.norms < 0
    if not negative.any():
        return
    sentinel = found.norms == NOT_COMPUTED
    if np.any(negative & ~sentinel):
        lowest = found.norms[negative & ~sentinel][0]
        message = f"{key} in {where} holds negative values such as {lowest:.3g}: it is no norm"
        raise RecordError(message)
    if sentinel.all():
        message = f"{key} in {where} is -1 everywhere: the norm was never computed"
        raise RecordError(message)
    _keep(found, ~sentinel)
    found.notes.append(f"{np.count_nonzero(sentinel)} values of -1 (not computed) left out")


def _drop_copies(found: Series) -> None:
    """Drop rows that repeat a step and its value, as other ranks and other loggers print them."""
    steps, norms = found.steps, found.norms
    if steps is None or len(steps) < 2 or is_rising(steps):
        return
    copy = np.zeros(len(steps), dtype=bool)
    for lag in range(1, min(FURTHEST_COPY, len(steps) - 1) + 1):
        near = np.flatnonzero((steps[lag:] == steps[:-lag]) & (steps[lag:] != UNKNOWN))
        if len(near):
            later, earlier = norms[near + lag], norms[near]
            same = (later == earlier) | (np.isnan(later) & np.isnan(earlier))
            copy[near[same] + lag] = True
    if copy.any():
        _keep(found, ~copy)
        found.notes.append(f"{np.count_nonzero(copy)} copies of the same step and value left out")


def _fill_unknown(found: Series) -> None:
    """A value without a step gets the step before it, at the start of the log the one after."""
    if found.steps is None or not (unknown := found.steps == UNKNOWN).any():
        return
    places = np.arange(len(unknown))
    before = np.maximum.accumulate(np.where(unknown, np.flatnonzero(~unknown)[0], places))
    found.steps = found.steps[before]


def _keep(found: Series, kept: npt.NDArray[np.bool_]) -> None:
    before = np.concatenate([[0], np.cumsum(kept)])
    found.starts = sorted(
        {int(before[start]) for start in found.starts if before[start] < before[-1]} | {0}
    )
    found.norms = found.norms[kept]
    found.steps = None if found.steps is None else found.steps[kept]


def _tell_runs_apart(found: Series) -> None:
    """A run begins where the steps fall back to the first one; a resume falls back less far."""
    if found.steps is None or is_rising(found.steps):
        return
    steps = found.steps
    gaps = np.diff(steps)
    counts = gap_counts(steps)
    slack = _median(counts) if counts else 0
    starts, start = [0], int(steps[0])
    for fall in np.flatnonzero(gaps < 0) + 1:
        if steps[fall] <= start + slack:
            starts.append(int(fall))
            start = int(steps[fall])
    if _are_epochs(starts, len(steps)):
        _join_epochs(found, starts)
        return
    found.starts = sorted({*found.starts, *starts})


def _are_epochs(starts: Sequence[int], n: int) -> bool:
    """Whether the steps restart so regularly that they count within an epoch."""
    sizes = np.diff([*starts, n])
    whole = sizes[:-1]
    return (
        len(whole) >= 3
        and whole.max() - whole.min() <= max(1, 0.02 * whole.max())
        and sizes[-1] <= whole.max()
    )


def _join_epochs(found: Series, starts: Sequence[int]) -> None:
    steps = np.array(found.steps, dtype=np.int64)
    for start in starts[1:]:
        steps[start:] += (
            steps[start - 1] - steps[start] + 1 if steps[start] <= steps[start - 1] else 0
        )
    found.steps = steps
    found.notes.append(
        f"steps restart {len(starts) - 1} times at even distances: taken as epochs of one run"
    )


def _runs(n: int) -> str:
    return f"{n} run{'s' * (n > 1)}"


def _listed(sizes: Sequence[int]) -> str:
    shown = ", ".join(map(str, sizes[:6]))
    return shown + (", ..." if len(sizes) > 6 else "")
