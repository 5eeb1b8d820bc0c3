"""The norms of a run as text for the study, so that no shared file system is needed."""

from __future__ import annotations

import base64
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from normtune import statistics
from normtune.records import NormRecord

PART = 60_000  # characters; a TEXT of MySQL holds 65,535
MOST = 40 * PART  # of one run: some 150,000 norms
LEAST_STEPS = 100
MOST_BYTES = 1 << 28  # of a record that is unpacked
_STEP = re.compile(rb'\{"step": (-?\d+)')


def last_step(record: NormRecord, max_norm: float) -> int | None:
    """The last step whose norm a controller needs; None where it needs them all.

    Up to its first clipped step a run must repeat the unclipped one of its seed bit for bit.

    Args:
        record: What the run recorded.
        max_norm: What it was clipped at.
    """
    clipped = np.flatnonzero(~(statistics.coefficients(record.norms, max_norm) >= 1))
    if not len(clipped):
        return None
    end = max(int(clipped[0]) + 1, LEAST_STEPS)
    return int(record.steps[end]) if end < len(record) else None


def pack(file: Path, until: int | None = None) -> tuple[tuple[str, ...], int | None]:
    """A record file as parts of text.

    Args:
        file: The record file.
        until: The last step to take along; all without it.

    Returns:
        The parts, and the last step in them: `until`, or an earlier one where that would make more
        than `MOST` characters.
    """
    lines = file.read_bytes().splitlines(keepends=True)
    while True:
        text = base64.b85encode(zlib.compress(b"".join(_cut(lines, until)), 9)).decode("ascii")
        if len(text) <= MOST:
            return tuple(text[i : i + PART] for i in range(0, len(text), PART)), until
        longest = max((int(found[1]) for found in map(_STEP.match, lines) if found), default=0)
        until = int((longest if until is None else min(until, longest)) * 0.95 * MOST / len(text))


def _cut(lines: Sequence[bytes], until: int | None) -> Iterator[bytes]:
    """The lines up to a step, and those that belong to no step."""
    for line in lines:
        found = _STEP.match(line)
        if until is None or found is None or int(found[1]) <= until:
            yield line


def unpack(parts: Sequence[str], file: Path) -> None:
    """Write the record file that was packed; a reader finds a whole one or none."""
    packed = base64.b85decode("".join(parts))
    data = zlib.decompressobj().decompress(packed, MOST_BYTES)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(file)
