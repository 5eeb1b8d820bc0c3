"""The lines of a record file: their grammar, both ways, and the file as its attempts."""

from __future__ import annotations

import io
import json
import math
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from normtune.errors import RecordError

FORMAT_VERSION = 1
SUFFIX = ".norms.jsonl"
BLOCK_BYTES = 1 << 22
LEAF_BYTES = 1 << 14  # stretches below this are not divided to find their plain parts
LARGE_BYTES = 1 << 16
PANDAS_PAYS_BYTES = 1 << 25  # of a file: pandas reads faster than numpy, but is slow to import
LONGEST_LINE = 1 << 25  # bytes; a device such as /dev/zero never ends its line

Floats = npt.NDArray[np.float64]
Json = dict[str, Any]


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


# --- reading ---------------------------------------------------------------------------------


_PREFIX = b'{"step": '
_MIDDLE = b', "norm": '
_NUMERIC = b"0123456789.eE+- \n"


@dataclass
class Block:
    """Rows of one stretch of one attempt, in the order of the file."""

    steps: npt.NDArray[np.int64]
    norms: Floats
    details: dict[int, Json]  # row number in the block -> the whole line, where it says more


@dataclass(eq=False)
class Attempt:
    """One start of a run: its header, its rows, its series and what was found."""

    header: Json
    blocks: list[Block] = field(default_factory=list)
    declared: list[Json] = field(default_factory=list)
    findings: list[Json] = field(default_factory=list)

    @property
    def id(self) -> str:
        """The id that a later attempt names in ``continues``."""
        return str(self.header.get("attempt", ""))


@dataclass
class Lines:
    """A record file, line by line: its attempts in order, and how many lines were torn."""

    path: Path
    attempts: list[Attempt]
    torn: int  # lines that no JSON reader accepts

    @classmethod
    def read(cls, path: Path) -> Lines:
        """Read a file.

        Raises:
            RecordError: If it is missing, empty or no record.
        """
        lines = cls(path=path, attempts=[], torn=0)
        seen = 0
        if path.is_file() and path.stat().st_size >= PANDAS_PAYS_BYTES:
            import pandas  # noqa: F401, ICN001  what `_parse_plain` then uses
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
        middle = block.find(b"\n", len(block) // 2) + 1
        if len(block) > LEAF_BYTES and 0 < middle < len(block):
            # One irregular line, such as the header, costs a small stretch its fast reading.
            self._take(block[:middle], first=False)
            self._take(block[middle:], first=False)
            return
        self._take_mixed(_objects(block))

    def _take_mixed(self, objects: Iterable[Json | None]) -> None:
        rows: list[Json] = []
        for line in objects:
            if line is None:
                self.torn += 1
            elif "normtune" in line:
                self._close(rows)
                self.attempts.append(Attempt(header=line))
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


def _parse_plain(block: bytes) -> Block | None:
    """A block that holds nothing but plain rows, parsed by numpy; None for any other block."""
    lines = block.count(b"\n")
    if not (block.startswith(_PREFIX) and block.endswith(b"}\n") and block.count(b"}\n") == lines):
        return None
    text = block.replace(_PREFIX, b"").replace(_MIDDLE, b" ").replace(b"}", b"")
    removed = lines * (len(_PREFIX) + len(_MIDDLE))  # a space and a brace make up for each other
    if len(block) - len(text) != removed or text.translate(None, _NUMERIC):
        return None
    if len(text) >= LARGE_BYTES and _pandas_reads_exactly():
        return _large_table(text, lines)
    try:
        values = np.fromstring(text.decode("ascii"), sep=" ")
    except (ValueError, DeprecationWarning):
        return None
    if len(values) != 2 * lines or np.abs(values[0::2]).max(initial=0.0) >= 2.0**63:
        return None
    return Block(values[0::2].astype(np.int64), values[1::2].copy(), {})


def _pandas_reads_exactly() -> bool:
    """Whether pandas is here, and one that reads each number as Python does (3.1 and later)."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and tuple(map(int, pandas.__version__.split(".")[:2])) >= (3, 1)


def _large_table(text: bytes, lines: int) -> Block | None:
    """Steps and norms in two columns, read by pandas: three times as fast as numpy."""
    import pandas as pd

    try:
        table = pd.read_csv(
            io.BytesIO(text), sep=" ", header=None, na_filter=False, low_memory=False
        )
    except ValueError:  # a line with more numbers
        return None
    if table.shape != (lines, 2) or table[0].dtype != np.int64 or table[1].dtype.kind not in "fi":
        return None
    return Block(table[0].to_numpy(copy=True), table[1].to_numpy(np.float64, copy=True), {})


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


def _rows_block(rows: Sequence[Json]) -> Block:
    details = {i: line for i, line in enumerate(rows) if len(line) > 2}
    norms = np.array([_norm(line) for line in rows])
    steps = np.array([integer(line["step"]) for line in rows], dtype=np.int64)
    return Block(steps, norms, details)


def _norm(line: Json) -> float:
    value = line["norm"]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number(value)
    return math.inf if line.get("kind") == "inf" else math.nan


def integer(value: Any) -> int:
    """A whole number that fits int64; -1 for anything else."""
    size = number(value) if isinstance(value, int | float) else math.nan
    return int(value) if abs(size) < 2.0**63 else -1


def number(value: Any) -> float:
    """A number that strict JSON may have had to write as a string."""
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        return math.inf
    except (TypeError, ValueError):
        return math.nan
