"""MLflow's file store: one file a metric, one line `timestamp value step` a value."""

from __future__ import annotations

import math
import re
from pathlib import Path, PurePath

from normtune.sources.clipping import KEYS, in_text
from normtune.sources.families import family
from normtune.sources.numbers import number, whole
from normtune.sources.streams import Bytes
from normtune.sources.tables import Asked, Column, Reading

_LINE = re.compile(rb"\d{10,16} [-+.\w]{1,40}(?: \d{1,18})?\s*")


def looks_like_metric(start: bytes) -> bool:
    """Whether a file that begins with `start` is a metric of MLflow's file store."""
    lines = start.split(b"\n")[:4]
    whole_lines = lines[:-1] or lines
    return bool(lines[0]) and all(_LINE.fullmatch(line) for line in whole_lines)


def read(data: Bytes, asked: Asked) -> Reading:
    """Read one metric; its name is the file's path below `metrics`."""
    name = metric_name(data.name)
    reading = Reading(data.name, "MLflow metric")
    column = asked.column(name)
    if column is None and asked.key is None:
        reading.hint = f"its name says {name!r}"
        return reading
    if column is None:
        column = Column(name)
    column.family = family(name, _siblings(data.path))
    for lines in data.lines():
        for line in lines:
            _take(line.decode(errors="replace").split(), column, reading)
    reading.columns = {name: column}
    reading.max_norm, reading.stated = _parameter(data.path)
    return reading


def metric_name(path: str) -> str:
    """The metric that a file of the store holds.

    >>> metric_name("mlruns/0/ab12/metrics/train/grad_norm")
    'train/grad_norm'
    """
    parts = PurePath(path).parts
    at = len(parts) - 1 - parts[::-1].index("metrics") if "metrics" in parts else len(parts) - 2
    return "/".join(parts[at + 1 :])


def _take(fields: list[str], column: Column, reading: Reading) -> None:
    value = number(fields[1]) if len(fields) in (2, 3) else None
    if value is not None:
        column.add(whole(fields[2]) if len(fields) == 3 else None, value)
    elif fields:
        reading.torn += 1


def _siblings(path: Path) -> set[str]:
    try:
        return {entry.name for entry in path.parent.iterdir()}
    except OSError:
        return set()


def _parameter(path: Path) -> tuple[float, str]:
    """The run's max_norm, from the store's `params` folder."""
    for folder in list(path.parents)[:4]:
        for key in sorted(KEYS):
            file = folder / "params" / key
            try:
                text = file.read_bytes()[:100] if file.is_file() else b""
            except OSError:
                continue
            stated = in_text(f"{key}={text.decode(errors='replace')}".encode())
            if not math.isnan(stated):
                return stated, f"params/{key}"
    return math.nan, ""
