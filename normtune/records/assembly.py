"""From the lines of a record file to a `NormRecord`: its last chain of attempts, one series."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from normtune.errors import RecordError
from normtune.records.lines import Attempt, Block, Floats, Json, Lines, integer, number
from normtune.records.record import ANONYMOUS, Finding, NormRecord, Origin


def load(
    path: str | os.PathLike[str], *, series: str | None = None, attempt: int | None = None
) -> NormRecord:
    """Read a record file, see `NormRecord.load`."""
    return choose(Lines.read(Path(path)), series=series, attempt=attempt)


def last_steps(path: str | os.PathLike[str]) -> tuple[str, dict[str, int]]:
    """The id of the last attempt in a record file, and the last step of each series.

    Raises:
        RecordError: If the file is missing or no record.
    """
    chain, _ = _chain(Lines.read(Path(path)), None)
    steps = {name: max(int(s.max()) for s in rows.steps) for name, rows in _split(chain).items()}
    return chain[-1].id, steps


def starts(path: str | os.PathLike[str], *, series: str | None = None) -> tuple[NormRecord, ...]:
    """Every start of the run in a record file by itself, in the order of the file.

    Args:
        path: The file.
        series: Which series; starts without it are left out.

    Raises:
        RecordError: If the file is missing or no record.
    """
    lines = Lines.read(Path(path))
    chains = [[attempt] for attempt in lines.attempts if attempt.blocks]
    found = [(chain, _split(chain)) for chain in chains]
    taken = [(c, rows, series or max(rows, key=lambda k: rows[k].n)) for c, rows in found]
    return tuple(
        _assemble(lines, c, name, rows[name], ()) for c, rows, name in taken if name in rows
    )


@dataclass
class _Rows:
    """Rows of one series over a chain of attempts, before repeated steps are dropped."""

    steps: list[npt.NDArray[np.int64]] = field(default_factory=list)
    norms: list[Floats] = field(default_factory=list)
    details: list[tuple[int, Json]] = field(default_factory=list)
    n: int = 0

    def add(self, block: Block, keep: npt.NDArray[np.intp] | None) -> None:
        where = np.arange(len(block.steps)) if keep is None else keep
        position = (
            {int(old): self.n + new for new, old in enumerate(where)} if block.details else {}
        )
        self.details += [(position[i], d) for i, d in block.details.items() if i in position]
        self.steps.append(block.steps[where])
        self.norms.append(block.norms[where])
        self.n += len(where)


def choose(lines: Lines, *, series: str | None, attempt: int | None) -> NormRecord:
    """The record of one series of the last chain of attempts, or of one attempt.

    Raises:
        RecordError: If there is no step, or no such series or attempt.
    """
    chain, note = _chain(lines, attempt)
    found = _split(chain)
    if not found:
        name = "the record" if lines.path == Path() else lines.path
        message = f"{name} holds no step: the run ended before its first recorded step"
        raise RecordError(message)
    if series is not None and series not in found:
        message = f"{lines.path} has no series {series!r}; it has {', '.join(map(repr, found))}"
        raise RecordError(message)
    name = series or max(found, key=lambda key: (found[key].n, _is_clip(chain, key)))
    notes = [note] if note else []
    if lines.torn:
        notes.append(f"{lines.torn} torn line{'s' * (lines.torn > 1)} skipped")
    notes += [f"also series {key!r}: {rows.n} steps" for key, rows in found.items() if key != name]
    return _assemble(lines, chain, name, found[name], tuple(notes))


def _chain(lines: Lines, attempt: int | None) -> tuple[list[Attempt], str]:
    attempts = lines.attempts
    n = len(attempts)
    if attempt is not None:
        if not (1 <= attempt <= n or -n <= attempt <= -1):
            message = f"attempt must lie in 1..{n} but got {attempt}"
            raise RecordError(message)
        return [attempts[attempt - 1 if attempt > 0 else attempt]], ""
    last = next((a for a in reversed(attempts) if a.blocks), attempts[-1])
    chain = [last]
    by_id = {a.id: a for a in attempts}
    while (earlier := by_id.get(str(chain[0].header.get("continues")))) and earlier not in chain:
        chain.insert(0, earlier)
    others = n - len(chain)
    note = f"{others} other start{'s' * (others > 1)} of the run in this file; --attempt picks"
    return chain, note if others else ""


def _default_series(attempt: Attempt) -> str:
    declared = (line for line in attempt.declared if line.get("default"))
    return str(next((line["series"] for line in declared), ANONYMOUS))


def _is_clip(chain: Sequence[Attempt], name: str) -> bool:
    return any(d["series"] == name and d.get("by") == "clip" for a in chain for d in a.declared)


def _split(chain: Sequence[Attempt]) -> dict[str, _Rows]:
    found: dict[str, _Rows] = {}
    for attempt in chain:
        default = _default_series(attempt)
        for block in attempt.blocks:
            named = {i: str(d["series"]) for i, d in block.details.items() if "series" in d}
            if not named:
                found.setdefault(default, _Rows()).add(block, None)
                continue
            names = np.array([named.get(i, default) for i in range(len(block.steps))])
            for name in dict.fromkeys(names.tolist()):
                found.setdefault(name, _Rows()).add(block, np.flatnonzero(names == name))
    return found


def _assemble(
    lines: Lines, chain: Sequence[Attempt], name: str, rows: _Rows, notes: tuple[str, ...]
) -> NormRecord:
    steps = np.concatenate(rows.steps)
    head = chain[-1].header
    max_norm = _forward(rows, "max_norm", number(head.get("max_norm", "nan")))
    columns = {
        "norms": np.concatenate(rows.norms),
        "max_norm": max_norm,
        "lr": _forward(rows, "lr", number(head.get("lr", "nan"))),
        "skipped": _flags(rows, "skipped"),
        "belted": _flags(rows, "belted"),
    }
    last = _last_of_each(steps)
    groups = _groups(rows)
    declared = {
        k: v for a in chain for d in a.declared if d["series"] == name for k, v in d.items()
    }
    metadata = {k: v for k, v in head.items() if k not in ("normtune", "max_norm", "lr")}
    metadata |= {k: v for k, v in declared.items() if k not in ("series", "default")}
    asked = [d["asked"] for _, d in rows.details if "asked" in d]
    if asked:
        metadata["asked_max_norm"] = number(asked[-1])
    imposed = [d["imposed"] for _, d in rows.details if "imposed" in d]
    if imposed:
        metadata["imposed"] = True if imposed[-1] else None
    if not isinstance(last, slice):
        notes += (f"{len(steps) - len(last)} repeated steps: the later attempt counts",)
    return NormRecord(
        steps=steps[last],
        **{key: values[last] for key, values in columns.items()},  # type: ignore[arg-type]
        groups={key: values[last] for key, values in groups.items()},
        series=name,
        metadata=MappingProxyType(metadata),
        findings=_findings(chain),
        origin=Origin(path="" if lines.path == Path() else str(lines.path), notes=notes),
    )


def _last_of_each(steps: npt.NDArray[np.int64]) -> npt.NDArray[np.intp] | slice:
    """What keeps the last row of each step, ordered by step; a slice where that is every row."""
    if len(steps) < 2 or np.all(steps[1:] > steps[:-1]):
        return slice(None)
    _, first_from_end = np.unique(steps[::-1], return_index=True)
    return len(steps) - 1 - first_from_end


def _forward(rows: _Rows, key: str, start: float) -> Floats:
    """A value that is written only where it changes, for every row."""
    changes = [(i, number(line[key])) for i, line in rows.details if key in line]
    where = np.array([0, *(i for i, _ in changes), rows.n])
    values = np.array([start, *(value for _, value in changes)])
    return np.repeat(values, np.diff(where))


def _flags(rows: _Rows, key: str) -> npt.NDArray[np.bool_]:
    flags = np.zeros(rows.n, dtype=bool)
    flags[[i for i, line in rows.details if line.get(key)]] = True
    return flags


def _groups(rows: _Rows) -> dict[str, Floats]:
    groups: dict[str, Floats] = {}
    for i, line in rows.details:
        members = line.get("groups")
        for name, value in members.items() if isinstance(members, dict) else ():
            groups.setdefault(name, np.full(rows.n, np.nan))[i] = number(value)
    return groups


def _findings(chain: Sequence[Attempt]) -> tuple[Finding, ...]:
    """One finding of each kind and call site; a later line about it replaces the earlier one."""
    found: dict[tuple[str, str], Finding] = {}
    for line in (f for a in chain for f in a.findings):
        key = (str(line["finding"]), str(line.get("site", "")))
        found[key] = Finding(
            kind=key[0],
            site=key[1],
            text=str(line.get("text", "")),
            step=integer(line.get("step", 0)),
            count=integer(line.get("count", 1)),
            blocks=bool(line.get("blocks")),
        )
    return tuple(found.values())
