"""Console logs: lines of text, any of which may tell a gradient norm."""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Iterator

from normtune.sources.clipping import in_text
from normtune.sources.dialects import (
    ANY_NAME,
    ANY_NORM,
    ANY_STEP,
    CONTEXT,
    DIALECTS,
    EPOCH,
    NO_OWNER,
    Dialect,
    by_key,
    learned,
)
from normtune.sources.families import HF, UNKNOWN
from normtune.sources.json_logs import flat_objects
from normtune.sources.keys import Role, role
from normtune.sources.numbers import number, whole
from normtune.sources.other_ranks import OtherRanks
from normtune.sources.rows import EpochClock, Rows
from normtune.sources.streams import Bytes
from normtune.sources.tables import Asked, Column, Reading

ENOUGH = 20  # lines that are worth to be read at once
LONGEST = 1 << 16  # bytes of a line that are searched
MOST_COLUMNS = 500
MOST_SEARCHED = 1 << 22  # bytes of lines that speak of clipping
_PLACES = {id(dialect): i for i, dialect in enumerate(DIALECTS)}
_OTHER = len(DIALECTS)
_COLOUR = re.compile(rb"\x1b\[[0-9;:?]{0,30}[A-Za-z]")
_RANK = re.compile(rb"((?:\[(?:rank|default)|)\d{1,4})\]?: ?(?![\d:])")
_PRETTY = re.compile(rb"\s{0,200}[\"'][^\"']{0,200}[\"']\s{0,4}:\s{0,4}[^{}]{0,60}$")


def read(data: Bytes, asked: Asked) -> Reading:
    """Read a console log."""
    reading = Reading(data.name, "text log")
    lines = _Lines(asked, reading)
    for block in data.lines():
        lines.take(block, unfinished=data.unfinished)
    reading.columns = lines.columns()
    reading.other_ranks = lines.other_ranks
    if lines.pretty and not any(len(column) for column in reading.columns.values()):
        reading.columns = _spread(data, asked)
    _hint(reading, lines)
    return reading


def _spread(data: Bytes, asked: Asked) -> dict[str, Column]:
    """JSON objects that a log spreads over several lines."""
    rows = Rows(asked)
    for row in flat_objects(data):
        rows.take(row)
    rows.name()
    return rows.columns


def _hint(reading: Reading, lines: _Lines) -> None:
    families = [c.family for c in reading.columns.values() if c.family and len(c)]
    name = next((family.name for family in families if family.name), "")
    if name:
        reading.kind = f"{name} text log"
    if lines.hugging_face and not families:
        reading.hint = (
            "a Hugging Face log holds grad_norm since transformers 4.38; its trainer_state.json may"
        )


class _Lines:
    """Sorts the norms of lines into columns, one for each dialect and key."""

    def __init__(self, asked: Asked, reading: Reading) -> None:
        self.pretty = 0
        self.hugging_face = False
        self.other_ranks = OtherRanks()
        self._asked = asked
        self._reading = reading
        self._columns: dict[tuple[int, str], Column | None] = {}
        self._rows = Rows(asked)
        self._dialect: Dialect | None = None
        self._clocks: dict[int, EpochClock] = {}
        self._context: int | None = None
        self._rank: bytes | None = None  # the rank that is read
        self._speaker: bytes | None = None  # the rank of this line
        self._epoch = (-1.0, -1.0)  # the last one, and where this run began
        self._width = 0
        self._stepless = 0  # lines in a row that tell a norm but no step
        self._searched = 0  # bytes searched for a max_norm
        self._own = by_key(asked.key) if asked.key else None
        self._own_hint = asked.key.lower().encode() if asked.key else b"\0"

    def take(self, lines: list[bytes], *, unfinished: bool) -> None:
        hinted = [line for line in lines if b"norm" in line or b"grad" in line]
        if len(hinted) > ENOUGH and not unfinished and self._at_once(hinted):
            return  # a statement of max_norm has norm or grad in it and prevents this
        own = self._own_hint if self._own else None
        for line in lines:
            if (
                b"norm" in line
                or b"grad" in line
                or b"Norm" in line
                or b"grdn" in line
                or b"NORM" in line
                or (own and own in line.lower())
            ):
                self._line(line[:LONGEST] if len(line) > LONGEST else line, unfinished=unfinished)
            elif b"[step=" in line or b"[batch=" in line:
                self._note_step(line)
            elif b"clip" in line or b"CLIP" in line:
                self._note_clip(line)
            elif b"'loss': " in line:
                self.hugging_face = True

    def _at_once(self, lines: list[bytes]) -> bool:
        """Take lines that all speak the dialect of the line before; else False, and none taken."""
        dialect = self._dialect
        if dialect is None or dialect.whole is None or self._own is not None:
            return False
        column = self._columns.get((_PLACES.get(id(dialect), _OTHER), dialect.key))
        text = b"\n".join(lines)
        if column is None or not self._is_one_rank(lines, text):
            return False
        if b"\x1b" in text:
            text = _COLOUR.sub(b"", text)
        found = dialect.whole.findall(text)
        if len(found) != len(lines):
            return False
        try:
            values = array("d", [float(groups[-1]) for groups in found])
            if len(found[0]) == 2:
                steps = array("q", [int(groups[0]) for groups in found])
            else:
                steps = array(
                    "q", [(int(e) - dialect.first_epoch) * int(n) + int(i) for e, i, n, _ in found]
                )
        except (ValueError, OverflowError):
            return False
        column.steps.extend(steps)
        column.values.extend(values)
        self._width = len(found[-1][-1])
        return True

    def _is_one_rank(self, lines: list[bytes], text: bytes) -> bool:
        if _RANK.match(lines[0]) or self._rank is not None:
            return all((m := _RANK.match(line)) and m[1] == self._rank for line in lines)
        return b"[rank" not in text and b"[default" not in text

    def columns(self) -> dict[str, Column]:
        """The columns by key; of dialects that tell the same key the one with most values."""
        self._rows.name()
        places = sorted(self._columns, key=lambda place: place[0])  # ties go to the earlier dialect
        found = [c for place in places if (c := self._columns[place]) is not None]
        best: dict[str, Column] = {}
        for column in [*found, *self._rows.columns.values()]:
            if column.key not in best or len(column) > len(best[column.key]):
                best[column.key] = column
        most = max((len(column) for column in best.values()), default=0)
        return {key: column for key, column in best.items() if 100 * len(column) >= most}

    def _line(self, line: bytes, *, unfinished: bool) -> None:
        if b"\x1b" in line:
            line = _COLOUR.sub(b"", line)
        if self._is_copy(line):
            self._compare(line)
            return
        dialect = self._dialect
        if dialect is not None and self._speak(dialect, line, unfinished=unfinished):
            return
        if b'{"' in line and line.rstrip().endswith(b"}") and self._json(line):
            return
        for dialect in DIALECTS:
            if dialect is not self._dialect and self._speak(dialect, line, unfinished=unfinished):
                self._dialect = dialect
                return
        if not self._any(line, unfinished=unfinished):
            self._note_clip(line)
            if b"[step=" in line or b"[batch=" in line:
                self._note_step(line)

    def _is_copy(self, line: bytes) -> bool:
        """Whether another rank prints this; the first rank that tells a norm is read."""
        self._speaker = None
        if line.startswith((b"[rank", b"[default")) or line[:1].isdigit():
            match = _RANK.match(line)
            self._speaker = match[1] if match else None
        return self._rank is not None and self._speaker not in (None, self._rank)

    def _compare(self, line: bytes) -> None:
        """Keep what another rank tells of a step."""
        dialect = self._dialect
        if dialect is None or dialect.step is None or not self.other_ranks.wanted:
            return
        value, step = dialect.value.search(line), dialect.step.search(line)
        if value is None or step is None or len(step.groups()) != 1 or not step[1].isdigit():
            return
        told = number(value[value.lastindex or 0].decode(errors="replace"))
        if told is not None:
            self.other_ranks.add(int(step[1][:18]), told)

    def _speak(self, dialect: Dialect, line: bytes, *, unfinished: bool) -> bool:
        for literal in dialect.needs:
            if literal not in line:
                return False
        match = dialect.value.search(line)
        if match is None:
            return False
        step = self._context if dialect.context else None
        if dialect.step is not None:
            found = dialect.step.search(line)
            if found is None:
                return False
            place = _PLACES.get(id(dialect), _OTHER)
            step = self._step(place, found.groups(), dialect.first_epoch)
        if not dialect.many:
            return self._value(dialect, step, match, unfinished=unfinished)
        values = [
            self._value(dialect, step, match, unfinished=unfinished)
            for match in dialect.value.finditer(line)
        ]
        if dialect.family is HF:
            self._note_epoch(line, self._columns.get((_PLACES[id(dialect)], dialect.key)))
        return any(values)

    def _value(
        self, dialect: Dialect, step: int | None, match: re.Match[bytes], *, unfinished: bool
    ) -> bool:
        groups = match.groups()
        key = dialect.key or groups[0].decode(errors="replace")
        column = self._column(_PLACES.get(id(dialect), _OTHER), key, dialect)
        return column is not None and self._add(column, step, match, unfinished=unfinished)

    def _column(self, place: int, key: str, dialect: Dialect | None) -> Column | None:
        try:
            return self._columns[place, key]
        except KeyError:
            pass
        if len(self._columns) >= MOST_COLUMNS:
            return None
        known = self._role(place, key)
        family = dialect.family if dialect is not None else UNKNOWN
        column = self._asked.column(key, role_=known, family=family)
        self._columns[place, key] = column
        return column

    def _role(self, place: int, key: str) -> Role:
        """A framework's own line is a total norm, whatever it is called there."""
        if place != _OTHER and DIALECTS[place].key:
            return "total"
        known = role(key)
        return "other" if known == "weak" and not self._asked.matches(key) else known

    def _add(
        self, column: Column, step: int | None, match: re.Match[bytes], *, unfinished: bool
    ) -> bool:
        text = match[match.lastindex or 0]
        if unfinished and 2 * len(text) <= self._width and not match.string[match.end() :].strip():
            self._reading.torn += 1  # 12 of 123.45
            return True
        try:
            value: float | None = float(text)
        except ValueError:
            value = number(text.decode(errors="replace"))
        if value is None:
            return False
        self._width = len(text)
        self._rank = self._rank or self._speaker
        column.add(step, value)
        return True

    def _step(self, place: int, groups: tuple[bytes | None, ...], first: int = 0) -> int | None:
        if len(groups) == 1 and groups[0] is not None and groups[0].isdigit():
            return int(groups[0][:18])
        counts = [group for group in groups if group is not None and group[:1].isdigit()]
        if len(counts) == 1:
            return None if counts[0][-1:] in b"KMB" else whole(counts[0].decode())
        numbers = [int(group[:15]) for group in counts]
        if len(numbers) == 3 and numbers[2] >= numbers[1]:
            return (numbers[0] - first) * numbers[2] + numbers[1]
        return self._clocks.setdefault(place, EpochClock()).step(numbers[0], numbers[1])

    def _any(self, line: bytes, *, unfinished: bool) -> bool:
        """Any other line: a name with grad and norm in it, then a number."""
        if _PRETTY.match(line):
            self.pretty += 1
            return False
        taken: list[tuple[str, bytes]] = []
        step, word = None, b""
        for name, match in self._named(line):
            key = name.decode(errors="replace")
            column = self._column(_OTHER, key, None)
            if column is None:
                continue
            if not taken:
                step, word = self._any_step(line)
            if self._add(column, step, match, unfinished=unfinished):
                taken.append((key, name))
        if len(taken) == 1 and self._asked.key is None:
            self._stepless = 0 if word else self._stepless + 1
            if word or self._stepless > ENOUGH:
                self._dialect = learned(*taken[0], word)
        return bool(taken)

    def _named(self, line: bytes) -> Iterator[tuple[bytes, re.Match[bytes]]]:
        if self._own is not None and self._asked.key is not None:
            own = self._own.search(line)
            if own:
                yield self._asked.key.encode(), own
                return
        for match in ANY_NORM.finditer(line):
            before = ANY_NAME.search(line[max(0, match.start() - 100) : match.start()])
            start = NO_OWNER.sub(b"", before[1]) if before else b""
            yield (start + match[1]).strip(b" -/.@"), match

    def _any_step(self, line: bytes) -> tuple[int | None, bytes]:
        """The step that a line tells, and the word for it."""
        for pattern in ANY_STEP:
            found = pattern.search(line)
            if found:
                word = b"" if found[1][:1].isdigit() else found[1]
                return self._step(_OTHER, found.groups()), word
        return self._context, b""

    def _json(self, line: bytes) -> bool:
        try:
            row = json.loads(line[line.index(b'{"') :])
        except (ValueError, RecursionError):
            return False
        if not isinstance(row, dict):
            return False
        before = sum(len(column) for column in self._rows.columns.values())
        self._rows.take(row)
        return sum(len(column) for column in self._rows.columns.values()) > before

    def _note_step(self, line: bytes) -> None:
        found = CONTEXT.search(line[:LONGEST])
        if found:
            self._context = int(found[1][:15])

    def _note_clip(self, line: bytes) -> None:
        said = (
            b"clip" in line or b"CLIP" in line or b"max_grad_norm" in line or b'"max_norm"' in line
        )
        if said and self._searched < MOST_SEARCHED:
            self._searched += len(line)
            stated = in_text(line)
            if not math.isnan(stated):
                self._reading.max_norm, self._reading.stated = stated, "the log itself"

    def _note_epoch(self, line: bytes, column: Column | None) -> None:
        """A log without steps tells a new run by its epoch, which falls back to the start."""
        found = EPOCH.search(line)
        if found is None or column is None:
            return
        epoch = float(found[1])
        last, start = self._epoch
        if start < 0 or (epoch < last and epoch <= 2 * start + 1e-9):
            start = epoch
            if last >= 0:
                column.breaks.append(len(column) - 1)
        self._epoch = (epoch, start)
