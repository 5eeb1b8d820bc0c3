"""Where a recorder keeps its rows: a record file that only grows, or memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from normtune.errors import RecordError
from normtune.records.assembly import choose
from normtune.records.lines import (
    SUFFIX,
    Attempt,
    Block,
    Json,
    Lines,
    dumps,
    header,
    may_be_record,
    row,
    strict,
)
from normtune.records.record import NormRecord


class RecordWriter:
    """Appends whole lines to a record file.

    A failed write keeps the lines (up to `keep` of them) and tries again with the next ones.

    Args:
        path: The file; missing folders are made. A record that exists already only grows.
        keep: How many lines to hold while the disk refuses them.

    Raises:
        RecordError: If the file cannot be written, or exists and is no record.
    """

    def __init__(self, path: str | os.PathLike[str], *, keep: int = 100_000) -> None:
        self.path = Path(path)
        self.error: OSError | None = None
        self._keep = keep
        self._waiting: list[str] = []
        self._torn = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(
                self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0), 0o644
            )
            self._torn = self._ends_torn(os.fstat(self._descriptor).st_size)
        except OSError as error:
            message = f"cannot write the record {self.path}: {error.strerror or error}"
            raise RecordError(message) from None
        self._pid = os.getpid()

    def _ends_torn(self, size: int) -> bool:
        """Whether the last line of the file that exists was cut off."""
        if not size:
            return False
        if not may_be_record(os.read(self._descriptor, 64)):
            os.close(self._descriptor)
            message = f"{self.path} exists and is no normtune record; choose another path"
            raise RecordError(message)
        os.lseek(self._descriptor, size - 1, os.SEEK_SET)
        return os.read(self._descriptor, 1) != b"\n"

    def write(self, lines: Iterable[str]) -> bool:
        """Append `lines`; False where the disk refused them for now (`error` says why)."""
        self._waiting.extend(lines)
        if not self._waiting:
            return True
        start = "\n" if self._torn else ""
        data = (start + "\n".join(self._waiting) + "\n").encode()
        try:
            written = os.write(self._descriptor, data)
        except OSError as error:
            return self._refused(error)
        if written < len(data):
            return self._cut(data, written)
        self._waiting.clear()
        self._torn = False
        self.error = None
        return True

    def close(self) -> bool:
        """Write what waits and close the file; False where lines were lost."""
        if self._descriptor < 0:
            return True
        complete = self.write([]) if os.getpid() == self._pid else True
        try:
            os.close(self._descriptor)
        except OSError as error:
            self.error = error
            complete = False
        self._descriptor = -1
        return complete

    def _refused(self, error: OSError) -> bool:
        self.error = error
        del self._waiting[: -self._keep]
        return False

    def _cut(self, data: bytes, written: int) -> bool:
        """A full disk took only a part: its whole lines are safe, the torn one is repeated."""
        whole = data[:written].count(b"\n") - data[:written].startswith(b"\n")
        self._torn = not data[:written].endswith(b"\n")
        del self._waiting[:whole]
        return self._refused(OSError(28, "No space left on device"))


class Row(NamedTuple):
    """One step of one series on its way into a record; `extra` as for `row`."""

    step: int
    norm: float
    extra: Mapping[str, object] = MappingProxyType({})


class MemoryStore:
    """An attempt that is kept in memory, for a recorder without a path."""

    def __init__(self, head: Json) -> None:
        self.head = head
        self._attempt = Attempt(header=head)
        self._earlier: list[Attempt] = []
        self.error: OSError | None = None

    def branch(self) -> MemoryStore:
        """An empty store for a forked child."""
        return MemoryStore(_child_of(self.head))

    def rows(self, rows: Sequence[Row]) -> None:
        """Keep `rows`."""
        if rows:
            details = {i: strict(dict(r.extra)) for i, r in enumerate(rows) if r.extra}
            steps = np.array([r.step for r in rows], dtype=np.int64)
            norms = np.array([r.norm for r in rows], dtype=np.float64)
            self._attempt.blocks.append(Block(steps, norms, details))

    def declare(self, line: Json) -> None:
        """Keep the description of a series."""
        self._attempt.declared.append(line)

    def finding(self, line: Json) -> None:
        """Keep a finding."""
        self._attempt.findings.append(line)

    def record(self, series: str | None = None) -> NormRecord:
        """What was kept so far."""
        lines = Lines(Path(), [*self._earlier, self._attempt], 0)
        return choose(lines, series=series, attempt=None)

    def to_file(self, path: str | os.PathLike[str]) -> FileStore:
        """The same attempt in a file, which takes what comes from now on."""
        store = FileStore(path, self.head)
        for line in [*self._attempt.declared, *self._attempt.findings]:
            store.declare(line)
        for block in self._attempt.blocks:
            values = zip(block.steps.tolist(), block.norms.tolist(), strict=True)
            store.rows([Row(s, n, block.details.get(i, {})) for i, (s, n) in enumerate(values)])
        return store

    def state(self) -> list[Json]:
        """All attempts as plain lists and numbers, for a checkpoint."""
        return [_plain(attempt) for attempt in [*self._earlier, self._attempt]]

    def load(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Put back the attempts of `state`, before this one."""
        self._earlier = [_attempt_of(attempt) for attempt in state]

    def close(self) -> bool:
        """Nothing is lost by closing."""
        return True


def _child_of(head: Json) -> Json:
    return header() | head | {"attempt": f"{head['attempt']}-{os.getpid()}"}


def _plain(attempt: Attempt) -> Json:
    blocks = [[b.steps.tolist(), b.norms.tolist(), list(b.details.items())] for b in attempt.blocks]
    described = {"declared": list(attempt.declared), "findings": list(attempt.findings)}
    return {"header": attempt.header, "blocks": blocks} | described


def _attempt_of(state: Mapping[str, Any]) -> Attempt:
    blocks = [
        Block(np.array(steps, dtype=np.int64), np.array(norms, dtype=np.float64), dict(details))
        for steps, norms, details in state["blocks"]
    ]
    return Attempt(state["header"], blocks, list(state["declared"]), list(state["findings"]))


class FileStore:
    """An attempt that is written to a record file."""

    def __init__(self, path: str | os.PathLike[str], head: Json) -> None:
        self.head = head
        self._writer = RecordWriter(path)
        self._writer.write([dumps(head)])

    def branch(self) -> FileStore:
        """A file beside this one for a forked child."""
        name = self.path.name.removesuffix(SUFFIX)
        path = self.path.with_name(f"{name}.{os.getpid()}{SUFFIX}")
        return FileStore(path, _child_of(self.head))

    @property
    def path(self) -> Path:
        """The file."""
        return self._writer.path

    @property
    def error(self) -> OSError | None:
        """Why the last write failed; None where it did not."""
        return self._writer.error

    def rows(self, rows: Sequence[Row]) -> None:
        """Append `rows`."""
        lines = [
            row(step, norm, **extra) if extra else row(step, norm)  # type: ignore[arg-type]
            for step, norm, extra in rows
        ]
        self._writer.write(lines)

    def declare(self, line: Json) -> None:
        """Append the description of a series."""
        self._writer.write([dumps(line)])

    def finding(self, line: Json) -> None:
        """Append a finding."""
        self._writer.write([dumps(line)])

    def record(self, series: str | None = None) -> NormRecord:
        """Read the file back."""
        return NormRecord.load(self._writer.path, series=series)

    def close(self) -> bool:
        """Close the file; False where lines were lost."""
        return self._writer.close()
