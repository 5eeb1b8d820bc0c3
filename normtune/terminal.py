"""The norms over the steps as a few lines of characters, for a terminal."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from normtune.format import number

if TYPE_CHECKING:
    import numpy.typing as npt

    from normtune.records import NormRecord
    from normtune.statistics import Floats

NARROWEST = 80  # columns of a terminal from which on there is a plot
ROWS = 7
MARGIN = 24  # columns for the numbers at the left and at the right
BRAILLE = 0x2800
# The bits of a braille character, by row and column of its dots.
DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
LINE = "\N{BOX DRAWINGS LIGHT QUADRUPLE DASH HORIZONTAL}"
DENSE = 12  # norms in a column of dots from which on their p10 to p90 is filled


def plot_lines(record: NormRecord, max_norm: float, *, width: int) -> list[str]:
    """Norms over the steps on a log scale, with a line at `max_norm`; empty where too narrow.

    Args:
        record: The norms.
        max_norm: Where the line goes.
        width: Columns of the terminal.
    """
    norms = record.finite
    norms = norms[norms > 0]
    if width < NARROWEST or not len(norms):
        return []
    logs = np.log10(norms)
    low, high = _range(logs, max_norm)
    columns = min(width - MARGIN, 100)
    field = _field(logs, low, high, columns)
    line = _row(math.log10(max_norm), low, high, 4 * ROWS) // 4
    return [_line(row, field[row], line, (low, high, max_norm)) for row in range(ROWS)]


def _range(logs: Floats, max_norm: float) -> tuple[float, float]:
    """From the smallest to the largest, at least half a decade."""
    ends = (float(logs.min()), float(logs.max()), math.log10(max_norm))
    low, high = min(ends), max(ends)
    spare = max(0.0, 0.5 - (high - low)) / 2
    return low - spare, high + spare


def _row(value: float, low: float, high: float, rows: int) -> int:
    """The row of dots of a value, counted from the top."""
    return min(max(int((high - value) / (high - low) * rows), 0), rows - 1)


def _field(logs: Floats, low: float, high: float, columns: int) -> npt.NDArray[np.int64]:
    """Braille characters, shape ``(ROWS, columns)``."""
    dots = np.zeros((4 * ROWS, 2 * columns), dtype=bool)
    n = min(2 * columns, len(logs))
    edges = np.linspace(0, len(logs), n + 1).astype(int)
    for i, (a, b) in enumerate(pairwise(edges)):
        column = i * 2 * columns // n
        span = logs[a:b]
        if len(span) >= DENSE:
            p10, p90 = (float(p) for p in np.percentile(span, (10, 90)))
            top, bottom = (_row(end, low, high, 4 * ROWS) for end in (p90, p10))
            dots[top : bottom + 1, column] = True
            span = np.array([span.min(), span.max()])
        for value in span:
            dots[_row(float(value), low, high, 4 * ROWS), column] = True
    cells = dots.reshape(ROWS, 4, columns, 2)
    return np.asarray((cells * DOTS[None, :, None, :]).sum(axis=(1, 3)), dtype=np.int64)


def _line(
    row: int, cells: npt.NDArray[np.int64], line: int, values: tuple[float, float, float]
) -> str:
    low, high, max_norm = values
    named = {0: 10**high, ROWS - 1: 10**low, line: max_norm}
    left = number(named[row]) if row in named else ""
    empty = LINE if row == line else " "
    field = "".join(chr(BRAILLE + int(cell)) if cell else empty for cell in cells)
    end = " <- suggested" if row == line else ""
    return f"{left:>9} {field}{end}".rstrip()
