"""JSON documents and JSON Lines: trainer_state.json, scalars.json, metrics.jsonl and the like."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from normtune.sources.clipping import in_mapping, in_text
from normtune.sources.families import HF
from normtune.sources.numbers import number, whole
from normtune.sources.rows import DEEPEST, Rows
from normtune.sources.streams import Bytes
from normtune.sources.tables import Asked, Reading

LOOKED = 20  # rows that are searched for a max_norm
LARGEST = 1 << 26  # bytes of one document; from a larger one only its flat objects are taken
_FLAT = re.compile(rb"\{[^{}]{0,100000}\}")
_STEPS = ("steps", "step", "global_step", "iterations", "iteration")


def read_lines(data: Bytes, asked: Asked) -> Reading:
    """Read JSON Lines; lines that are no JSON are counted."""
    reading = Reading(data.name, "JSON Lines")
    rows = Rows(asked)
    for lines in data.lines():
        whole = _objects(lines, plain=reading.looked >= LOOKED)
        if whole is not None:
            rows.extend(whole)
            continue
        for line in lines:
            _take_line(line, rows, reading)
    return _finished(reading, rows, data)


def read_document(data: Bytes, asked: Asked) -> Reading:
    """Read one JSON document; from a torn or very large one its flat objects."""
    reading = Reading(data.name, "JSON")
    rows = Rows(asked)
    document = _whole(data)
    if document is None:
        reading.notes.append("not one whole JSON document: its separate objects were read")
        for row in flat_objects(data):
            rows.take(row)
    else:
        _Walk(rows, asked, PurePath(data.name).stem).visit(document, "")
        reading.max_norm, reading.stated = in_mapping(document), "the file itself"
    if b'"log_history"' in data.start(1 << 20):
        reading.kind = "trainer_state.json"
        steps = number(document.get("max_steps")) if isinstance(document, dict) else None
        reading.schedule = math.nan if steps is None else steps
    return _finished(reading, rows, data)


def flat_objects(data: Bytes) -> Iterator[dict[str, Any]]:
    """JSON objects without objects inside, wherever they stand in the text."""
    rest = b""
    for lines in data.lines():
        block = rest + b"\n".join(lines) + b"\n"
        end = 0
        for match in _FLAT.finditer(block):
            end = match.end()
            row = _object(match[0])
            if row is not None:
                yield row
        rest = block[end:][-200_000:]


def _objects(lines: list[bytes], *, plain: bool) -> list[dict[str, Any]] | None:
    """The rows of a block of lines at once, or None where the lines need a look each."""
    text = b",".join(lines)
    if not plain and (b"clip" in text or b"max_grad_norm" in text):
        return None
    try:
        rows = json.loads(b"[" + text + b"]")
    except (ValueError, RecursionError):
        return None
    return rows if len(rows) == len(lines) and all(type(row) is dict for row in rows) else None


def _take_line(line: bytes, rows: Rows, reading: Reading) -> None:
    if not line or line.isspace():
        return
    row = _object(line)
    if row is None:
        reading.torn += 1
        return
    rows.take(row)
    if reading.looked < LOOKED and (b"clip" in line or b"max_grad_norm" in line):
        reading.looked += 1
        stated = in_mapping(row)
        if math.isnan(stated):  # mmcv writes its config as one string
            stated = in_text(line)
        if not math.isnan(stated):
            reading.max_norm, reading.stated = stated, "the log itself"


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _whole(data: Bytes) -> Any:
    text = data.text(LARGEST)
    if text is None:
        return None
    try:
        return json.loads(text.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None


def _finished(reading: Reading, rows: Rows, data: Bytes) -> Reading:
    rows.name()
    reading.columns = rows.columns
    if reading.kind == "trainer_state.json":
        for column in rows.columns.values():
            column.family = HF
    elif {"current_steps", "total_steps", "percentage"} <= rows.beside:
        reading.hint = "LLaMA-Factory writes its norms to trainer_state.json beside it, not here"
    elif rows.beside and "loss" in rows.beside and "eval_loss" in rows.beside:
        reading.hint = "a Hugging Face log holds grad_norm since transformers 4.38"
    if PurePath(data.name).name == "all_results.json":
        reading.hint = "the norms of this run are in trainer_state.json beside it"
    return reading


class _Walk:
    """Finds the rows, and the lists of bare numbers, of a document."""

    def __init__(self, rows: Rows, asked: Asked, stem: str) -> None:
        self._rows = rows
        self._asked = asked
        self._stem = stem

    def visit(self, node: Any, name: str, depth: int = 0) -> None:
        if depth > DEEPEST:
            return
        if isinstance(node, list):
            self._list(node, name, depth)
        elif isinstance(node, dict):
            self._mapping(node, name, depth)

    def _list(self, node: list[Any], name: str, depth: int) -> None:
        if node and all(isinstance(item, dict) for item in node):
            for row in node:
                self._rows.take(row)
            return
        if node and self._series(node, name or self._stem, None):
            return
        for item in node[:1000]:
            self.visit(item, name, depth + 1)

    def _mapping(self, node: Mapping[str, Any], name: str, depth: int) -> None:
        if node and all(isinstance(v, dict) and str(k).isdigit() for k, v in node.items()):
            for key, row in node.items():
                self._rows.take({"step": key} | row)
            return
        steps = next((node[k] for k in _STEPS if isinstance(node.get(k), list)), None)
        lists = {k: v for k, v in node.items() if isinstance(v, list)}
        for key, value in lists.items():
            own = name if key.lower() in ("values", "value", "data", "y") else _joined(name, key)
            if not self._series(value, own, steps):
                self.visit(value, own, depth + 1)
        for key, value in node.items():
            if isinstance(value, dict):
                self.visit(value, _joined(name, key), depth + 1)
        if depth == 0 and not lists:
            self._rows.take(node)

    def _series(self, node: list[Any], name: str, steps: list[Any] | None) -> bool:
        """Take a list of numbers, of (step, value) or of TensorBoard's (time, step, value)."""
        if not node or not _plain(node[0]):
            return False
        width = len(node[0]) if isinstance(node[0], list) else 0
        column = self._rows.columns.get(name)
        if column is None:
            column = self._asked.column(name)
        if column is None:
            return width == 0
        self._rows.columns[name] = column
        for i, item in enumerate(node):
            cell = item[-1] if isinstance(item, list) and item else item
            step = item[-2] if isinstance(item, list) and len(item) > 1 else _at(steps, i)
            value = number(cell)
            if value is not None:
                column.add(whole(step), value)
            elif cell is not None:
                column.refuse(cell)
        return True


def _plain(item: Any) -> bool:
    if isinstance(item, list):
        return 2 <= len(item) <= 3 and all(
            _plain(cell) and not isinstance(cell, list) for cell in item
        )
    return item is None or (isinstance(item, int | float | str) and not isinstance(item, bool))


def _at(steps: list[Any] | None, i: int) -> Any:
    return steps[i] if steps is not None and i < len(steps) else None


def _joined(name: str, key: str) -> str:
    return f"{name}/{key}" if name else str(key)
