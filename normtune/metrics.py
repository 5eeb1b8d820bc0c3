"""The validation values of a command: from its output, from a file, or told by the script."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normtune import records
from normtune.errors import RecordError, StudyError
from normtune.format import clean
from normtune.orders import FOLDER
from normtune.sources import folders, formats
from normtune.sources.numbers import number
from normtune.sources.streams import Bytes
from normtune.sources.tables import UNKNOWN, Asked, Column
from normtune.tasks import OUTPUT, REPORTED, Task

Value = tuple[int, float]  # (step, value)

TOLD = "metric.jsonl"
QUOTED = 3  # lines of an output in a message
WIDEST = 160  # characters of each
LARGEST = 1 << 26  # bytes of a JSON document that is searched for a key
SHOWN = 8  # names in a message
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_EXPONENT = re.compile(r"[eE][-+]?[0-9]+")
_NOT_FINITE = re.compile(r"(?<![\w.])[-+]?(?:nan|inf(?:inity)?)(?![\w.])", re.IGNORECASE)
# What may stand where a line says nan: a pattern for numbers matches one of them.
_STAND_INS = ("7.7777", "7.777777", "7.777", "7.77", "7.7", "7.77777", "7", "77.77", "7.777e+07")


class MetricError(StudyError):
    """A validation value that cannot be found; the message says what was there instead."""


# --- told by the script ------------------------------------------------------------------------


def report_metric(value: float, step: int | None = None) -> None:
    """Tell `normtune search` the validation value so far; does nothing in any other run.

    Args:
        value: The validation value: a number, or a tensor of one element.
        step: The training step; a count of the reports without it.

    Raises:
        ValueError: If `value` is no number.
    """
    folder = os.environ.get(FOLDER)
    if not folder or _rank():
        return
    try:
        plain = float(value)
    except (TypeError, ValueError, RuntimeError):
        message = f"report_metric needs the validation value as one number but got {value!r:.60}"
        raise ValueError(message) from None
    line = records.dumps({"value": plain, "step": None if step is None else int(step)})
    with (Path(folder) / TOLD).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _rank() -> int:
    """The rank of this process; only the first one tells."""
    if "torch" in sys.modules:
        from normtune import ranks

        return ranks.rank()
    return int(number(os.environ.get("RANK")) or 0)


def _told(folder: Path) -> list[Value]:
    try:
        lines = (folder / TOLD).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    rows = [json.loads(line) for line in lines]
    return _numbered([(row["step"], float(row["value"])) for row in rows])


# --- in the output -----------------------------------------------------------------------------


def in_output(file: Path, pattern: str) -> list[Value]:
    """The values that a pattern finds in an output, in their order.

    Args:
        file: The output.
        pattern: A regular expression whose first group is the number.

    Raises:
        MetricError: If what it finds is no number.
    """
    compiled = re.compile(pattern)
    return _numbered([(None, v) for line in _lines(file) for v in _matches(compiled, line)])


def _lines(file: Path) -> Iterator[str]:
    if not file.exists():
        return
    for block in Bytes(file, file.name).lines():
        for line in block:
            yield _ESCAPES.sub("", line.decode(errors="replace"))


def _matches(pattern: re.Pattern[str], line: str) -> list[float]:
    """The numbers of a line.

    >>> _matches(re.compile("loss ([0-9.]+)"), "loss 1.5e-05 after 3 epochs, best loss 0.25.")
    [1.5e-05, 0.25]
    >>> _matches(re.compile("loss ([0-9.]+)"), "val loss nan")
    [nan]
    """
    found = [_matched(match, line) for match in pattern.finditer(line) if match[1] is not None]
    return found or list(_not_finite(pattern, line))


def _matched(match: re.Match[str], line: str) -> float:
    text = match[1]
    rest = _EXPONENT.match(line, match.end(1))
    if rest and text[-1:].isdigit():  # [0-9.]+ would read 1.5e-05 as 1.5
        text += rest[0]
    value = number(text.strip(" \t,;:%|)]}.'\"")) if text else None
    if value is None:
        message = f"the metric {match.re.pattern!r} found {text!r}, which is no number"
        raise MetricError(message)
    return value


def _not_finite(pattern: re.Pattern[str], line: str) -> Iterator[float]:
    """The nan and inf of a line where a pattern such as ``([0-9.]+)`` expects digits.

    Without them the value of a diverged training would be its last finite one.
    """
    if not _NOT_FINITE.search(line):
        return
    for stand_in in _STAND_INS:
        text, places = _replaced(line, stand_in)
        hits = [
            value
            for match in pattern.finditer(text)
            for (start, end), value in places.items()
            if match[1] is not None and match.start(1) < end and start < match.end(1)
        ]
        if hits:
            yield from hits
            return


def _replaced(line: str, stand_in: str) -> tuple[str, dict[tuple[int, int], float]]:
    """A line with a number in each place of a nan or inf, and which of them is where."""
    text, last = "", 0
    places: dict[tuple[int, int], float] = {}
    for match in _NOT_FINITE.finditer(line):
        text += line[last : match.start()]
        places[len(text), len(text) + len(stand_in)] = float(match[0])
        text, last = text + stand_in, match.end()
    return text + line[last:], places


def quoted(file: Path, like: str = "") -> str:
    """The last lines of an output in quotes, those first that share words with a pattern.

    Args:
        file: The output.
        like: The pattern that found nothing.
    """
    lines = [line.strip() for line in _lines(file) if line.strip()]
    words = [word.lower() for word in re.findall(r"[A-Za-z]{3,}", like)]
    near = [
        line
        for line in lines
        if re.search(r"\d|nan|inf", line) and any(word in line.lower() for word in words)
    ]
    kept = near[-QUOTED:] or lines[-QUOTED:]
    return " / ".join(f'"{clean(line)[:WIDEST]}"' for line in kept)


# --- in a file ---------------------------------------------------------------------------------


def in_file(file: Path, key: str) -> list[Value]:
    """The values under a key of a JSON, JSON Lines, CSV or TensorBoard file.

    Args:
        file: The file, a folder that holds it, or a pattern of which the newest file counts.
        key: The key, column or tag; ``a/b`` is b in a.

    Raises:
        MetricError: If there is no such file or no such key, with what there is.
    """
    newest = _newest(file)
    if newest is None:
        message = f"the command wrote no {file}{_beside(file.parent)}"
        raise MetricError(message)
    try:
        found = _in_folder(newest, key) if newest.is_dir() else _in_files([newest], key)
    except RecordError as error:
        raise MetricError(str(error)) from None
    if not found:
        message = f"{newest} holds no {key!r}{_others(newest)}"
        raise MetricError(message)
    return found


def _newest(file: Path) -> Path | None:
    if file.exists():
        return file
    anchor = Path(file.anchor)
    pattern = str(file.relative_to(anchor)) if file.anchor else str(file)
    if not re.search(r"[*?[]", pattern):
        return None
    found = [path for path in anchor.glob(pattern) if path.exists()]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def _in_folder(folder: Path, key: str) -> list[Value]:
    for candidate in folders.candidates(folder, key)[: folders.MOST_TRIED]:
        if candidate.paths[0].name == OUTPUT:
            continue
        try:
            found = _in_files(candidate.paths, key)
        except RecordError:
            continue
        if found:
            return found
    return []


def _in_files(paths: Sequence[Path], key: str) -> list[Value]:
    direct = _in_document(paths[0], key)
    if direct:
        return direct
    reading = formats.reading([Bytes(path, str(path)) for path in paths], Asked(key))
    asked = Asked(key)
    columns = [c for c in reading.columns.values() if asked.matches(c.key) and len(c)]
    columns = [c for c in columns if c.key == key] or columns
    if len(columns) > 1:
        names = ", ".join(c.key for c in columns[:SHOWN])
        message = f"{paths[0]} holds several values named {key!r}: {names}; give the whole name"
        raise MetricError(message)
    return _of_column(columns[0]) if columns else []


def _of_column(column: Column) -> list[Value]:
    steps, values = column.arrays()
    known: list[int | None] = [None] * len(values)
    if steps is not None:
        known = [None if step == UNKNOWN else int(step) for step in steps]
    return _numbered(list(zip(known, values.tolist(), strict=True)))


def _in_document(file: Path, key: str) -> list[Value]:
    """The number, or the list of numbers, at a key of one JSON document."""
    if file.suffix != ".json" or file.stat().st_size > LARGEST:
        return []
    try:
        node: Any = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return []
    for part in [key] if isinstance(node, dict) and key in node else key.split("/"):
        node = node.get(part) if isinstance(node, dict) else None
    values = [number(item) for item in (node if isinstance(node, list) else [node])]
    return _numbered([(None, value) for value in values if value is not None])


class _All(Asked):
    """Every name of a file."""

    def matches(self, name: str) -> bool:
        return bool(name)


def _others(file: Path) -> str:
    """What else a file holds, in words."""
    if file.is_dir():
        return _beside(file)
    try:
        names = list(formats.reading([Bytes(file, str(file))], _All("*")).columns)
    except RecordError:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"; it holds {', '.join(map(clean, names[:SHOWN]))}{more}" if names else ""


def _beside(folder: Path) -> str:
    if not folder.is_dir():
        return ""
    names = sorted(path.name for path in folder.iterdir())[:SHOWN]
    return f"; {folder} holds {', '.join(map(clean, names)) or 'nothing'}"


def _numbered(values: Sequence[tuple[int | None, float]]) -> list[Value]:
    return [(i if step is None else step, value) for i, (step, value) in enumerate(values, 1)]


# --- of a run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Before:
    """A file as a run found it: an earlier run's values must not count as its own."""

    changed: int | None
    values: tuple[Value, ...]


class Metric:
    """Finds the values of one run of a command; made before the command starts.

    Args:
        task: The run.
        folder: Where `report_metric` tells its values.
    """

    def __init__(self, task: Task, folder: Path) -> None:
        self._task = task
        self._folder = folder
        path, _, key = (task.metric_file or "").partition(":")
        self._key = task.filled(key)
        self._file = task.home / task.filled(path)
        self._before = self._now() if task.metric_file is not None else _Before(None, ())

    def values(self) -> list[Value]:
        """The values of the run; a non-finite one counts only where no finite one follows.

        Raises:
            MetricError: If there are none, with what there is instead.
        """
        found = self._found()
        if not found:
            raise MetricError(self._why_none())
        last = max((i for i, (_, v) in enumerate(found) if math.isfinite(v)), default=-1)
        return [v for i, v in enumerate(found) if math.isfinite(v[1]) or i == last + 1]

    def _found(self) -> list[Value]:
        if self._task.metric_file is not None:
            return self._written()
        if self._task.metric == REPORTED:
            return _told(self._folder)
        return in_output(self._task.folder / OUTPUT, self._task.metric or "")

    def _written(self) -> list[Value]:
        """The values that this run wrote: all, or those that it appended."""
        before, found = self._before, in_file(self._file, self._key)
        if before.changed is not None and self._changed() == before.changed:
            message = f"{self._file} was not written by this run; it is from an earlier one"
            raise MetricError(message)
        n = len(before.values)
        appended = 0 < n < len(found) and tuple(found[:n]) == before.values
        return found[n:] if appended else found

    def _now(self) -> _Before:
        try:
            return _Before(self._changed(), tuple(in_file(self._file, self._key)))
        except MetricError:
            return _Before(self._changed(), ())

    def _changed(self) -> int | None:
        newest = _newest(self._file)
        if newest is None:
            return None
        inside = newest.rglob("*") if newest.is_dir() else [newest]
        return max((path.stat().st_mtime_ns for path in inside if path.is_file()), default=0)

    def _why_none(self) -> str:
        output = self._task.folder / OUTPUT
        like = self._task.metric or ""
        ended = quoted(output, "" if like == REPORTED else like)
        seen = f"its output has {ended}" if ended else "it printed nothing"
        if like == REPORTED:
            return f"the script never called normtune.report_metric(value); {seen}"
        return f"the metric {like!r} never appeared in the output; {seen}"
