"""TensorBoard event files: TFRecords of protobuf events, scalars in both of their encodings."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from normtune.sources.clipping import KEYS, in_mapping
from normtune.sources.numbers import number
from normtune.sources.protobuf import fields, packed, signed, varint
from normtune.sources.rows import Rows
from normtune.sources.streams import Bytes
from normtune.sources.tables import Asked, Reading

LARGEST_RECORD = 1 << 28
_WHOLE = {3: "i", 9: "q"}
_FLOATS = {1: "f", 2: "d", 19: "e"}
_TYPED = {5: "f", 6: "d"}  # number of a packed field -> format
_BFLOAT16, _STRING = 14, 7


def looks_like_events(start: bytes) -> bool:
    """Whether a file that begins with `start` is an event file: its first checksum fits."""
    return len(start) >= 12 and struct.unpack("<I", start[8:12])[0] == masked_crc(start[:8])


def read(files: Sequence[Bytes], asked: Asked) -> Reading:
    """Read the event files of one run, in the order given."""
    reading = Reading(files[0].name, "TensorBoard events")
    scalars = _Scalars(asked, reading)
    for data in files:
        for record in _records(data, reading):
            scalars.take(record)
    scalars.rows.name()
    reading.columns = scalars.rows.columns
    if not scalars.rows.beside:
        reading.hint = "it holds no scalars"
    return reading


def _records(data: Bytes, reading: Reading) -> Iterator[bytes]:
    """The payloads; a torn end costs only itself."""
    rest = b""
    need = 12
    for block in data.blocks():
        rest += block
        at = 0
        while len(rest) - at >= need:
            length = struct.unpack_from("<Q", rest, at)[0]
            if length > LARGEST_RECORD or not _sound(rest, at):
                reading.torn += 1
                return
            if len(rest) - at < length + 16:
                need = length + 16
                break
            yield rest[at + 12 : at + 12 + length]
            at += length + 16
            need = 12
        rest = rest[at:]
    reading.torn += bool(rest)


def _sound(block: bytes, at: int) -> bool:
    return bool(struct.unpack_from("<I", block, at + 8)[0] == masked_crc(block[at : at + 8]))


class _Scalars:
    """Sorts the scalars of events into columns."""

    def __init__(self, asked: Asked, reading: Reading) -> None:
        self.rows = Rows(asked)
        self._reading = reading

    def take(self, record: bytes) -> None:
        step, summaries = 0, []
        try:
            for field, content in fields(record):
                if field == 2 and isinstance(content, int):
                    step = signed(content)
                elif field == 5 and isinstance(content, bytes):
                    summaries.append(content)
            for summary in summaries:
                self._summary(step, summary)
        except (ValueError, struct.error):
            self._reading.torn += 1

    def _summary(self, step: int, summary: bytes) -> None:
        for field, value in fields(summary):
            if field != 1 or not isinstance(value, bytes):
                continue
            tag, scalar = _tagged(value)
            if isinstance(scalar, float):
                self.rows.take({"step": step, tag: scalar})
            elif isinstance(scalar, bytes):
                self._text(tag, scalar)

    def _text(self, tag: str, text: bytes) -> None:
        """Arguments that a framework wrote as text: its max_norm is among them."""
        name = tag.removesuffix("/text_summary").rpartition("/")[2]
        if name in KEYS:
            stated = in_mapping({name: text.decode(errors="replace")})
        elif b"clip" in text or b"max_grad_norm" in text:
            stated = in_mapping(_json(text))
        else:
            return
        if not math.isnan(stated):
            self._reading.max_norm, self._reading.stated = stated, f"its text summary {name!r}"


def _json(text: bytes) -> Any:
    start, end = text.find(b"{"), text.rfind(b"}")
    try:
        return json.loads(text[start : end + 1])
    except (ValueError, RecursionError):
        return None


def _tagged(value: bytes) -> tuple[str, float | bytes | None]:
    tag = ""
    found: float | bytes | None = None
    for field, content in fields(value):
        if field == 1 and isinstance(content, bytes):
            tag = content.decode(errors="replace")
        elif field == 2 and isinstance(content, bytes) and len(content) == 4:
            found = float(struct.unpack("<f", content)[0])
        elif field == 8 and isinstance(content, bytes):
            found = _tensor(content)
    return tag, found


def _tensor(message: bytes) -> float | bytes | None:
    """The one number, or the one string, of a tensor; None for any other tensor."""
    kind, numbers, raw = 0, [], b""
    for field, content in fields(message):
        if field == 1 and isinstance(content, int):
            kind = content
        elif field == 4 and isinstance(content, bytes):
            raw = content
        elif field in _TYPED and isinstance(content, bytes):
            numbers += packed(content, _TYPED[field])
        elif field in (7, 10, 13):
            numbers += _integers(field, content)
        elif field == 8 and isinstance(content, bytes) and kind == _STRING:
            return content
    if raw and not numbers:
        numbers = _raw(kind, raw)
    return _half(kind, numbers[0]) if len(numbers) == 1 else None


def _integers(field: int, content: int | bytes) -> list[float]:
    values, at = [], 0
    if isinstance(content, int):
        values = [content]
    else:
        while at < len(content):
            value, at = varint(content, at)
            values.append(value)
    return [float(value) if field == 13 else float(signed(value)) for value in values]


def _raw(kind: int, raw: bytes) -> list[float]:
    if kind in _FLOATS or kind in _WHOLE:
        return packed(raw, _FLOATS.get(kind) or _WHOLE[kind])
    if kind == _BFLOAT16:
        return packed(raw, "H")
    return []


def _half(kind: int, value: float) -> float | None:
    """Half-precision numbers travel as the bits of an integer."""
    if kind == _BFLOAT16:
        return float(struct.unpack("<f", struct.pack("<I", (int(value) & 0xFFFF) << 16))[0])
    return number(value)


# --- checksum -----------------------------------------------------------------------------------


def _table() -> list[int]:
    table = []
    for i in range(256):
        crc = i
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


_CRC = _table()


def masked_crc(data: bytes) -> int:
    """The masked CRC-32C of TFRecords.

    >>> hex(masked_crc(b"123456789"))
    '0xc78ab0e5'
    """
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _CRC[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
