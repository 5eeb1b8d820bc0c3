"""`NormRecord`: the norms of one run, and the JSONL file that keeps them."""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from normtune import markup
from normtune.errors import RecordError
from normtune.format import number

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION = 1
SUFFIX = ".norms.jsonl"
ANONYMOUS = "norm"  # the series of a record that never named one
BLOCK_BYTES = 1 << 22
LONGEST_LINE = 1 << 25  # bytes; a device such as /dev/zero never ends its line

Floats = npt.NDArray[np.float64]
Json = dict[str, Any]
ClipSide = Literal["before", "after", "unknown"]


@dataclass(frozen=True)
class Finding:
    """Something about a clip call that the user should know.

    Attributes:
        kind: A short name such as ``"clip-before-backward"``.
        text: The sentence for the user, with file and line of the call.
        site: ``file:line`` of the clip call, or ``""``.
        step: The step at which it was first seen.
        count: How often it was seen.
        blocks: Whether norms recorded like this cannot carry a suggestion.
    """

    kind: str
    text: str
    site: str = ""
    step: int = 0
    count: int = 1
    blocks: bool = False


@dataclass(frozen=True)
class Origin:
    """Where a record's values come from.

    Attributes:
        path: The file that was read, ``""`` for values from memory.
        kind: The family of the file, such as ``"normtune record"`` or ``"trainer_state.json"``.
        key: The key, column or tag that holds the norm.
        clip_side: Whether the values are norms before or after clipping.
        value: What one value stands for.
        notes: Sentences on what was left out and what else the source holds.
    """

    path: str = ""
    kind: str = "normtune record"
    key: str = "norm"
    clip_side: ClipSide = "before"
    value: Literal["each step", "last of window", "mean of window", "unknown"] = "each step"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class NormRecord:
    """Unclipped gradient norms of one run; all arrays have one entry a step, shape ``(n,)``.

    Attributes:
        steps: Step numbers, int64. The first step is 1.
        norms: Total norm before clipping, float64; nan or inf where it was not finite.
        max_norm: The max_norm in force at each step; inf where nothing clips, nan where unknown.
        lr: Learning rate of the first parameter group; nan where unknown.
        skipped: Steps that a GradScaler skipped; they stay outside all statistics.
        belted: Warm-up steps that the belt of ``clip_after`` clipped or skipped.
        groups: Norm per parameter or group, name -> array of shape ``(n,)``; may be empty.
        series: The name of this series: a clip call's ``file:line``, or the optimizer.
        metadata: The header of the record: optimizer, norm_type, torch version and so on.
        findings: What was found about the clip calls.
        origin: Where the values come from.
    """

    steps: npt.NDArray[np.int64]
    norms: Floats
    max_norm: Floats
    lr: Floats
    skipped: npt.NDArray[np.bool_]
    belted: npt.NDArray[np.bool_]
    groups: Mapping[str, Floats] = field(default_factory=dict)
    series: str = ANONYMOUS
    metadata: Mapping[str, Any] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    origin: Origin = Origin()

    @classmethod
    def of(
        cls,
        norms: npt.ArrayLike,
        *,
        steps: npt.ArrayLike | None = None,
        max_norm: npt.ArrayLike = np.nan,
        lr: npt.ArrayLike = np.nan,
        series: str = ANONYMOUS,
        metadata: Mapping[str, Any] | None = None,
        origin: Origin | None = None,
    ) -> NormRecord:
        """Build a record from plain numbers.

        Args:
            norms: One norm a step, shape ``(n,)``; nan and inf are kept.
            steps: Step numbers; 1 to n without.
            max_norm: The max_norm in force, one number or one a step.
            lr: The learning rate, one number or one a step.
            series: The name of the series.
            metadata: What else is known about the run.
            origin: Where the values come from.

        Raises:
            ValueError: If `norms` is not one-dimensional and numeric.
        """
        values = _floats(norms)
        n = len(values)
        return cls(
            steps=np.arange(1, n + 1) if steps is None else np.asarray(steps, dtype=np.int64),
            norms=values,
            max_norm=np.broadcast_to(np.asarray(max_norm, dtype=np.float64), (n,)).copy(),
            lr=np.broadcast_to(np.asarray(lr, dtype=np.float64), (n,)).copy(),
            skipped=np.zeros(n, dtype=bool),
            belted=np.zeros(n, dtype=bool),
            series=series,
            metadata=MappingProxyType(dict(metadata or {})),
            origin=origin or Origin(path="", kind="numbers from memory"),
        )

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, series: str | None = None, attempt: int | None = None
    ) -> NormRecord:
        """Read a ``*.norms.jsonl`` file.

        Args:
            path: The file.
            series: Which series; without it the one with most steps.
            attempt: Which start of the run, counted from 1 (negative from the end); without it
                the last start together with those that it continues.

        Raises:
            RecordError: If the file is missing, is not a record, or has no such series or attempt.
        """
        return _choose(_Lines.read(Path(path)), series=series, attempt=attempt)

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        return (
            f"NormRecord({len(self)} steps of {self.series!r} from {self.origin.path or 'memory'})"
        )

    @property
    def finite(self) -> Floats:
        """The norms that statistics use: finite, and of steps that really happened."""
        return self.norms[np.isfinite(self.norms) & ~self.skipped]

    @property
    def current(self) -> float | None:
        """The max_norm that the loop itself asked for last; None where unknown or off."""
        asked = self.metadata.get("asked_max_norm")
        if isinstance(asked, int | float) and math.isfinite(asked) and asked > 0:
            return float(asked)
        known = self.max_norm[~np.isnan(self.max_norm)]
        imposed = self.metadata.get("imposed") is not None
        return float(known[-1]) if len(known) and np.isfinite(known[-1]) and not imposed else None

    def skip(self, n: int) -> NormRecord:
        """The same record without its first `n` steps."""
        keep = slice(n, None)
        return replace(
            self,
            steps=self.steps[keep],
            norms=self.norms[keep],
            max_norm=self.max_norm[keep],
            lr=self.lr[keep],
            skipped=self.skipped[keep],
            belted=self.belted[keep],
            groups={name: values[keep] for name, values in self.groups.items()},
        )

    def _repr_html_(self) -> str:
        return _html(self)

    def to_frame(self) -> pd.DataFrame:
        """A pandas DataFrame with one row a step."""
        import pandas as pd

        columns = {
            "step": self.steps,
            "norm": self.norms,
            "max_norm": self.max_norm,
            "lr": self.lr,
            "skipped": self.skipped,
        }
        return pd.DataFrame(columns | {f"group {k}": v for k, v in self.groups.items()})


def _html(record: NormRecord) -> str:
    finite = record.finite
    rows: list[tuple[str, object]] = [("steps", len(record)), ("series", record.series)]
    if len(finite):
        ends = (float(finite.min()), float(np.median(finite)), float(finite.max()))
        names = ("smallest norm", "median norm", "largest norm")
        rows += list(zip(names, map(number, ends), strict=True))
    rows.append(("not finite", int((~np.isfinite(record.norms)).sum())))
    rows += [
        (key, record.metadata[key]) for key in ("optimizer", "torch") if key in record.metadata
    ]
    name = record.origin.path or "memory"
    picture = markup.sparkline(finite, "norms over the steps, on a logarithmic scale")
    notes = markup.points((*record.origin.notes, *(f.text for f in record.findings)))
    return (
        f"<p><b>NormRecord</b> from {markup.text(name)}</p>{picture}{markup.table((), rows)}{notes}"
    )


def _floats(values: npt.ArrayLike) -> Floats:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        message = "norms must be numbers but got values that are not; check the column or list"
        raise ValueError(message) from None
    if array.ndim != 1:
        message = f"norms must be one-dimensional but got shape {array.shape}"
        raise ValueError(message)
    return array


# --- writing ---------------------------------------------------------------------------------


def header(*, attempt: str | None = None, continues: str | None = None, **facts: object) -> Json:
    """The line that opens an attempt; non-finite numbers in `facts` become strings."""
    line: Json = {"normtune": FORMAT_VERSION, "attempt": attempt or uuid.uuid4().hex[:12]}
    line["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if continues is not None:
        line["continues"] = continues
    return line | {key: strict(value) for key, value in facts.items() if value is not None}


def row(
    step: int,
    norm: float,
    *,
    max_norm: float | None = None,
    lr: float | None = None,
    **extra: object,
) -> str:
    """One step as a line of strict JSON, without its newline.

    Args:
        step: Step number.
        norm: Total norm before clipping; a non-finite one is written as null with its kind.
        max_norm: The max_norm in force, only where it changed.
        lr: The learning rate, only where it changed.
        extra: Further fields of the line: ``series``, ``skipped``, ``groups``, ``asked`` and so on.
    """
    norm = float(norm)  # a numpy number's repr is no JSON
    if math.isfinite(norm):
        text = f'{{"step": {step}, "norm": {norm!r}'
    else:
        kind = "nan" if math.isnan(norm) else "inf"
        text = f'{{"step": {step}, "norm": null, "kind": "{kind}"'
    if max_norm is not None:
        extra["max_norm"] = max_norm
    if lr is not None:
        extra["lr"] = lr
    if extra:
        return f"{text}, {dumps(extra)[1:]}"
    return text + "}"


def strict(value: Any) -> Any:
    """`value` with every non-finite number replaced by the string "inf", "-inf" or "nan"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return value


def dumps(line: Mapping[str, object]) -> str:
    """`line` as strict JSON: no NaN, no Infinity."""
    return json.dumps(strict(line), allow_nan=False, default=str)


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


# --- reading ---------------------------------------------------------------------------------

_PREFIX = b'{"step": '
_MIDDLE = b', "norm": '
_NUMERIC = b"0123456789.eE+- \n"


@dataclass
class _Block:
    """Rows of one stretch of one attempt, in the order of the file."""

    steps: npt.NDArray[np.int64]
    norms: Floats
    details: dict[int, Json]  # row number in the block -> the whole line, where it says more


@dataclass(eq=False)
class _Attempt:
    header: Json
    blocks: list[_Block] = field(default_factory=list)
    declared: list[Json] = field(default_factory=list)
    findings: list[Json] = field(default_factory=list)

    @property
    def id(self) -> str:
        return str(self.header.get("attempt", ""))


@dataclass
class _Lines:
    path: Path
    attempts: list[_Attempt]
    torn: int  # lines that no JSON reader accepts

    @classmethod
    def read(cls, path: Path) -> _Lines:
        lines = cls(path=path, attempts=[], torn=0)
        seen = 0
        for block in _blocks(path):
            seen += 1
            lines._take(block, first=seen == 1)
        if not seen:
            message = f"{path} is empty: no step was recorded in it"
            raise RecordError(message)
        if not lines.attempts:
            message = f"{path} is not a normtune record: it has no header line"
            raise RecordError(message)
        return lines

    def _take(self, block: bytes, *, first: bool) -> None:
        fast = _parse_plain(block) if self.attempts else None
        if fast is not None:
            self.attempts[-1].blocks.append(fast)
            return
        if first and not block.lstrip().startswith(b"{"):
            message = f"{self.path} is not a normtune record: its first line is not a JSON object"
            raise RecordError(message)
        self._take_mixed(_objects(block))

    def _take_mixed(self, objects: Iterable[Json | None]) -> None:
        rows: list[Json] = []
        for line in objects:
            if line is None:
                self.torn += 1
            elif "normtune" in line:
                self._close(rows)
                self.attempts.append(_Attempt(header=line))
            elif "step" in line and "norm" in line:
                rows.append(line)
            elif self.attempts and "finding" in line:
                self.attempts[-1].findings.append(line)
            elif self.attempts and "series" in line:
                self.attempts[-1].declared.append(line)
        self._close(rows)

    def _close(self, rows: list[Json]) -> None:
        if rows and self.attempts:
            self.attempts[-1].blocks.append(_rows_block(rows))
        rows.clear()


_OPENING = b'{"normtune":'


def last_steps(path: str | os.PathLike[str]) -> tuple[str, dict[str, int]]:
    """The id of the last attempt in a record file, and the last step of each series.

    Raises:
        RecordError: If the file is missing or no record.
    """
    chain, _ = _chain(_Lines.read(Path(path)), None)
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
    lines = _Lines.read(Path(path))
    chains = [[attempt] for attempt in lines.attempts if attempt.blocks]
    found = [(chain, _split(chain)) for chain in chains]
    taken = [(c, rows, series or max(rows, key=lambda k: rows[k].n)) for c, rows in found]
    return tuple(
        _assemble(lines, c, name, rows[name], ()) for c, rows, name in taken if name in rows
    )


def is_record(start: bytes) -> bool:
    """Whether a file that begins with `start` is a normtune record."""
    return start.lstrip().startswith(_OPENING)


def may_be_record(start: bytes) -> bool:
    """Whether `start` begins a record, or is all that a full disk took of one."""
    begin = start.lstrip()[: len(_OPENING)]
    return is_record(start) or (_OPENING.startswith(begin) and start.lstrip() == begin)


def _blocks(path: Path) -> Iterator[bytes]:
    """Whole lines in blocks; a last line without its newline is kept, it may still be whole."""
    try:
        with path.open("rb") as file:
            rest = b""
            while chunk := file.read(BLOCK_BYTES):
                if len(rest) > LONGEST_LINE:
                    message = f"{path} is not a normtune record: it has no lines"
                    raise RecordError(message)
                chunk = rest + chunk
                end = chunk.rfind(b"\n") + 1
                rest = chunk[end:]
                if end:
                    yield chunk[:end]
            if rest.strip():
                yield rest
    except FileNotFoundError:
        message = f"no such file: {path}"
        raise RecordError(message) from None
    except OSError as error:
        message = f"cannot read {path}: {error.strerror or error}"
        raise RecordError(message) from None


def _parse_plain(block: bytes) -> _Block | None:
    """A block that holds nothing but plain rows, parsed by numpy; None for any other block."""
    lines = block.count(b"\n")
    if not (block.startswith(_PREFIX) and block.endswith(b"}\n") and block.count(b"}\n") == lines):
        return None
    if block.count(_PREFIX) != lines or block.count(_MIDDLE) != lines:
        return None
    text = block.replace(_PREFIX, b"").replace(_MIDDLE, b" ").replace(b"}", b"")
    if text.translate(None, _NUMERIC):
        return None
    try:
        values = np.fromstring(text.decode("ascii"), sep=" ")
    except (ValueError, DeprecationWarning):
        return None
    if len(values) != 2 * lines or np.abs(values[0::2]).max(initial=0.0) >= 2.0**63:
        return None
    return _Block(values[0::2].astype(np.int64), values[1::2].copy(), {})


def _objects(block: bytes) -> Iterator[Json | None]:
    """The JSON object of each line; None for a line that is none."""
    lines = [line for line in block.split(b"\n") if line.strip()]
    try:
        whole = json.loads(b"[" + b",".join(lines) + b"]")
        if len(whole) == len(lines) and all(isinstance(item, dict) for item in whole):
            yield from whole
            return
    except (ValueError, RecursionError):
        pass
    for line in lines:
        try:
            item = json.loads(line)
        except (ValueError, RecursionError):
            yield None
            continue
        yield item if isinstance(item, dict) else None


def _rows_block(rows: Sequence[Json]) -> _Block:
    details = {i: line for i, line in enumerate(rows) if len(line) > 2}
    norms = np.array([_norm(line) for line in rows])
    steps = np.array([_integer(line["step"]) for line in rows], dtype=np.int64)
    return _Block(steps, norms, details)


def _norm(line: Json) -> float:
    value = line["norm"]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _number(value)
    return math.inf if line.get("kind") == "inf" else math.nan


def _integer(value: Any) -> int:
    """A whole number that fits int64; -1 for anything else."""
    number = _number(value) if isinstance(value, int | float) else math.nan
    return int(value) if abs(number) < 2.0**63 else -1


def _number(value: Any) -> float:
    """A number that strict JSON may have had to write as a string."""
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        return math.inf
    except (TypeError, ValueError):
        return math.nan


@dataclass
class _Rows:
    """Rows of one series over a chain of attempts, before repeated steps are dropped."""

    steps: list[npt.NDArray[np.int64]] = field(default_factory=list)
    norms: list[Floats] = field(default_factory=list)
    details: list[tuple[int, Json]] = field(default_factory=list)
    n: int = 0

    def add(self, block: _Block, keep: npt.NDArray[np.intp] | None) -> None:
        where = np.arange(len(block.steps)) if keep is None else keep
        position = (
            {int(old): self.n + new for new, old in enumerate(where)} if block.details else {}
        )
        self.details += [(position[i], d) for i, d in block.details.items() if i in position]
        self.steps.append(block.steps[where])
        self.norms.append(block.norms[where])
        self.n += len(where)


def _choose(lines: _Lines, *, series: str | None, attempt: int | None) -> NormRecord:
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


def _chain(lines: _Lines, attempt: int | None) -> tuple[list[_Attempt], str]:
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


def _default_series(attempt: _Attempt) -> str:
    declared = (line for line in attempt.declared if line.get("default"))
    return str(next((line["series"] for line in declared), ANONYMOUS))


def _is_clip(chain: Sequence[_Attempt], name: str) -> bool:
    return any(d["series"] == name and d.get("by") == "clip" for a in chain for d in a.declared)


def _split(chain: Sequence[_Attempt]) -> dict[str, _Rows]:
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
    lines: _Lines, chain: Sequence[_Attempt], name: str, rows: _Rows, notes: tuple[str, ...]
) -> NormRecord:
    steps = np.concatenate(rows.steps)
    head = chain[-1].header
    max_norm = _forward(rows, "max_norm", _number(head.get("max_norm", "nan")))
    columns = {
        "norms": np.concatenate(rows.norms),
        "max_norm": max_norm,
        "lr": _forward(rows, "lr", _number(head.get("lr", "nan"))),
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
        metadata["asked_max_norm"] = _number(asked[-1])
    imposed = [d["imposed"] for _, d in rows.details if "imposed" in d]
    if imposed:
        metadata["imposed"] = True if imposed[-1] else None
    if len(last) < len(steps):
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


def _last_of_each(steps: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
    """Positions that keep the last row of each step, ordered by step."""
    if len(steps) < 2 or np.all(np.diff(steps) > 0):
        return np.arange(len(steps))
    _, first_from_end = np.unique(steps[::-1], return_index=True)
    return len(steps) - 1 - first_from_end


def _forward(rows: _Rows, key: str, start: float) -> Floats:
    """A value that is written only where it changes, for every row."""
    changes = [(i, _number(line[key])) for i, line in rows.details if key in line]
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
            groups.setdefault(name, np.full(rows.n, np.nan))[i] = _number(value)
    return groups


def _findings(chain: Sequence[_Attempt]) -> tuple[Finding, ...]:
    """One finding of each kind and call site; a later line about it replaces the earlier one."""
    found: dict[tuple[str, str], Finding] = {}
    for line in (f for a in chain for f in a.findings):
        key = (str(line["finding"]), str(line.get("site", "")))
        found[key] = Finding(
            kind=key[0],
            site=key[1],
            text=str(line.get("text", "")),
            step=_integer(line.get("step", 0)),
            count=_integer(line.get("count", 1)),
            blocks=bool(line.get("blocks")),
        )
    return tuple(found.values())


# --- keeping -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One step of one series on its way into a record; `extra` as for `row`."""

    step: int
    norm: float
    extra: Mapping[str, object] = field(default_factory=dict)


class MemoryStore:
    """An attempt that is kept in memory, for a recorder without a path."""

    def __init__(self, head: Json) -> None:
        self.head = head
        self._attempt = _Attempt(header=head)
        self._earlier: list[_Attempt] = []
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
            self._attempt.blocks.append(_Block(steps, norms, details))

    def declare(self, line: Json) -> None:
        """Keep the description of a series."""
        self._attempt.declared.append(line)

    def finding(self, line: Json) -> None:
        """Keep a finding."""
        self._attempt.findings.append(line)

    def record(self, series: str | None = None) -> NormRecord:
        """What was kept so far."""
        lines = _Lines(Path(), [*self._earlier, self._attempt], 0)
        return _choose(lines, series=series, attempt=None)

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


def _plain(attempt: _Attempt) -> Json:
    blocks = [[b.steps.tolist(), b.norms.tolist(), list(b.details.items())] for b in attempt.blocks]
    described = {"declared": list(attempt.declared), "findings": list(attempt.findings)}
    return {"header": attempt.header, "blocks": blocks} | described


def _attempt_of(state: Mapping[str, Any]) -> _Attempt:
    blocks = [
        _Block(np.array(steps, dtype=np.int64), np.array(norms, dtype=np.float64), dict(details))
        for steps, norms, details in state["blocks"]
    ]
    return _Attempt(state["header"], blocks, list(state["declared"]), list(state["findings"]))


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
        self._writer.write([row(r.step, r.norm, **r.extra) for r in rows])  # type: ignore[arg-type]

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
