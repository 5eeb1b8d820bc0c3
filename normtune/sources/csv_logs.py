"""CSV files: Lightning's metrics.csv, exports of W&B and TensorBoard, any table with a header."""

from __future__ import annotations

import csv
import operator
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from normtune.errors import RecordError
from normtune.sources.families import Family, family
from normtune.sources.keys import role
from normtune.sources.numbers import is_blank, number, whole
from normtune.sources.rows import STEP_KEYS, EpochClock
from normtune.sources.streams import Bytes
from normtune.sources.tables import Asked, Column, Reading

TENSORBOARD = ["wall time", "step", "value"]
MOST_COLUMNS = 5000
SAMPLED = 1000  # TensorBoard's download keeps at most so many points
_OTHER_METRIC = re.compile(
    r"(?i)loss|(?:^|[_-])lr(?:$|[_-])|learning|accura|reward|perplex|(?:^|_)acc(?:$|_)"
)
_NAMED = re.compile(r"^[^=<>{}\x00-\x1f]{0,300}$")


def looks_like_csv(start: bytes) -> str | None:
    """The delimiter of a table with a header that begins with `start`, or None."""
    lines = [line for line in start.decode(errors="replace").splitlines()[:8] if line.strip()]
    lines = [line for line in lines if not line.startswith("#")]
    if not lines or not all(_NAMED.match(name) for name in re.split(r"[,;\t]", lines[0])[:2000]):
        return None
    for delimiter in (",", "\t", ";"):
        if _is_table(lines, delimiter):
            return delimiter
    single = len(lines) > 1 and role(lines[0].strip().strip('"')) != "other"
    return "," if single and number(lines[1]) is not None else None


def read(data: Bytes, asked: Asked) -> Reading:
    """Read a table; its first line that is no comment names the columns."""
    reading = Reading(data.name, "CSV")
    table: _Table | None = None
    delimiter = looks_like_csv(data.start()) or ","
    for lines in data.lines():
        if table is not None and not data.unfinished and table.take_block(lines, delimiter):
            continue
        for cells in _cells(lines, delimiter):
            if table is None:
                if cells[0].startswith("#"):
                    continue
                table = _header(cells, asked, reading)
            elif not (data.unfinished and table.is_cut(cells)):
                table.take(cells)
    if table is None:
        message = f"{data.name} is empty: no line of it holds values"
        raise RecordError(message)
    return table.finished(reading)


def _is_table(lines: Sequence[str], delimiter: str) -> bool:
    names = next(csv.reader([lines[0]], delimiter=delimiter), [])
    if len(names) < 2 or any(number(name) is not None for name in names if name):
        return False
    if len(lines) == 1:
        return any(name.strip().lower() in _STEP_NAMES for name in names)
    width = [len(next(csv.reader([line], delimiter=delimiter), [])) for line in lines[1:6]]
    whole_lines = width[:-1] or width  # the last one may be cut by the end of the sample
    cells = next(csv.reader([lines[1]], delimiter=delimiter), [])
    numeric = sum(number(cell) is not None for cell in cells)
    return all(n == len(names) for n in whole_lines) and numeric > 0


_STEP_NAMES = frozenset({*STEP_KEYS, "wall time", "epoch", "time", "timestamp"})


def _cells(lines: list[bytes], delimiter: str) -> Iterator[list[str]]:
    for line in lines:
        if not line.strip():
            continue
        text = line.decode(errors="replace").replace("\0", "")
        if '"' not in text:
            yield text.split(delimiter)
            continue
        try:
            yield from csv.reader([text], delimiter=delimiter)
        except csv.Error:
            yield []


def _header(cells: Sequence[str], asked: Asked, reading: Reading) -> _Table:
    names = [cell.strip() for cell in cells]
    if [name.lower() for name in names] == TENSORBOARD:
        return _download(asked, reading)
    kept = [(i, asked.column(name)) for i, name in enumerate(names[:MOST_COLUMNS]) if name]
    columns = [(i, column) for i, column in kept if column is not None]
    beside = set(names)
    for _, column in columns:
        column.family = family(column.key, beside)
    return _Table(names, columns, _step_column(names), _place(names, "epoch"))


def _download(asked: Asked, reading: Reading) -> _Table:
    """TensorBoard's CSV: the name of the metric stands in the name of the file only."""
    name = re.sub(r"^run-.*?tag-", "", PurePath(reading.path).stem)
    reading.kind = "CSV downloaded from TensorBoard"
    if role(name) == "other" and _OTHER_METRIC.search(name) and asked.key is None:
        reading.hint = f"its name says {name!r}; --key Value takes it anyway"
        return _Table(TENSORBOARD, [], 1, None)
    key = name if asked.matches(name) or asked.key is None else "Value"
    known = role(name)
    column = Column(key, role_=known if known != "other" else "total", family=Family(""))
    if known == "other":
        reading.notes.append(
            "the file does not name its metric: make sure that it is the gradient norm"
        )
    return _Table(TENSORBOARD, [(2, column)], 1, None)


def _step_column(names: Sequence[str]) -> int | None:
    lowered = [name.lower() for name in names]
    return next((lowered.index(key) for key in STEP_KEYS if key in lowered), None)


def _place(names: Sequence[str], name: str) -> int | None:
    lowered = [n.lower() for n in names]
    return lowered.index(name) if name in lowered else None


def _present(
    steps: Sequence[int] | None, cells: Sequence[bytes]
) -> tuple[Sequence[int], Sequence[float]]:
    """The values of the cells that are not blank, with their steps."""
    if steps is None or b"" not in cells:
        return steps or (), list(map(float, cells))
    filled = [i for i, cell in enumerate(cells) if cell]
    return [steps[i] for i in filled], [float(cells[i]) for i in filled]


@dataclass
class _Table:
    """The columns of a table that are wanted, and where they stand."""

    names: Sequence[str]
    columns: list[tuple[int, Column]]
    step: int | None
    epoch: int | None
    torn: int = 0

    def __post_init__(self) -> None:
        self._clock = EpochClock()
        self._width = len(self.names)
        self._previous: Sequence[str] = [""]

    def is_cut(self, cells: Sequence[str]) -> bool:
        """Whether a last row without its newline ends within a value (12 of 123.45)."""
        short = len(cells) == self._width and 2 * len(cells[-1]) <= len(self._previous[-1])
        cut = len(cells) < self._width or short
        self.torn += cut
        return cut

    def take_block(self, lines: Sequence[bytes], delimiter: str) -> bool:
        """Take rows of plain numbers at once; False, and nothing taken, for any other block."""
        mark, width, n = delimiter.encode(), self._width, len(lines)
        text = mark.join(lines)
        if b'"' in text or b"\0" in text or self.step is None:
            return False
        cells = text.split(mark)
        if len(cells) != width * n or any(line.count(mark) != width - 1 for line in lines):
            return False
        try:
            steps = self._block_steps(cells)
            array("q", steps or ())  # refuses steps beyond int64
            parsed = [_present(steps, cells[at::width]) for at, _ in self.columns]
        except (ValueError, OverflowError):
            return False
        if steps is None:
            return False
        for (at_steps, values), (_, column) in zip(parsed, self.columns, strict=True):
            column.extend(at_steps, values)
        self._previous = [cell.decode(errors="replace") for cell in cells[-width:]]
        return True

    def _block_steps(self, cells: Sequence[bytes]) -> Sequence[int] | None:
        """The steps of a block, None where they need the epoch to be told apart."""
        steps = list(map(int, cells[self.step :: self._width]))
        if self.epoch is None:
            return steps
        rising = all(map(operator.le, steps, steps[1:]))
        epoch = number(cells[-self._width + self.epoch].decode(errors="replace"))
        return steps if rising and epoch is not None and self._clock.passes(epoch, steps) else None

    def take(self, cells: Sequence[str]) -> None:
        if len(cells) < self._width and len(cells) <= max((i for i, _ in self.columns), default=0):
            self.torn += 1
            return
        self._previous = cells
        step: int | None = None
        numbered = False
        for i, column in self.columns:
            cell = cells[i]
            if not cell or cell.isspace():
                continue
            if not numbered:
                step, numbered = self._step(cells), True
            self._add(column, step, cell)

    def _add(self, column: Column, step: int | None, cell: str) -> None:
        try:
            column.add(step, float(cell))
        except ValueError:
            value = number(cell)
            if value is not None:
                column.add(step, value)
            elif not is_blank(cell) and cell.strip() != column.key:  # a header repeated by a resume
                column.refuse(cell)

    def _step(self, cells: Sequence[str]) -> int | None:
        if self.step is None or self.step >= len(cells):
            return None
        cell = cells[self.step]
        step = int(cell) if cell.isdecimal() and len(cell) < 18 else whole(cell)
        if step is None or self.epoch is None or self.epoch >= len(cells):
            return step
        epoch = number(cells[self.epoch])
        return step if epoch is None else self._clock.step(epoch, step)

    def finished(self, reading: Reading) -> Reading:
        reading.columns = {column.key: column for _, column in self.columns}
        reading.torn = self.torn
        named = list(self.names) == TENSORBOARD
        if named and any(len(column) == SAMPLED for _, column in self.columns):
            reading.notes.append(f"TensorBoard downloads a sample of {SAMPLED} points at most")
        return reading
