"""W&B's offline files `run-*.wandb`: a LevelDB-style log of protobuf records."""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator
from typing import Any

from normtune.sources.clipping import in_mapping
from normtune.sources.protobuf import fields, signed
from normtune.sources.rows import Rows
from normtune.sources.streams import Bytes
from normtune.sources.tables import Asked, Reading

MAGIC = b":W&B"
_BLOCK = 32768
_HEADER = 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_HISTORY, _CONFIG, _RUN = 2, 5, 17


def read(data: Bytes, asked: Asked) -> Reading:
    """Read the history and the config of one run."""
    reading = Reading(data.name, "W&B offline file")
    rows = Rows(asked)
    config: dict[str, Any] = {}
    for record in _records(data, reading):
        try:
            _take(record, rows, config)
        except ValueError:
            reading.torn += 1
    rows.name()
    reading.columns = rows.columns
    stated = in_mapping(config)
    if not math.isnan(stated):
        reading.max_norm, reading.stated = stated, "the config in the file"
    return reading


def _take(record: bytes, rows: Rows, config: dict[str, Any]) -> None:
    for field, content in fields(record):
        if not isinstance(content, bytes):
            continue
        if field == _HISTORY:
            rows.take(_history(content))
        elif field == _CONFIG:
            config.update(_items(content))
        elif field == _RUN:
            for inner, part in fields(content):
                if inner == 4 and isinstance(part, bytes):
                    config.update(_items(part))


def _history(message: bytes) -> dict[str, Any]:
    row = _items(message)
    for field, content in fields(message):
        if field == 2 and isinstance(content, bytes) and "_step" not in row:
            steps = [signed(n) for f, n in fields(content) if f == 1 and isinstance(n, int)]
            row["_step"] = steps[-1] if steps else 0
    return row


def _items(message: bytes) -> dict[str, Any]:
    """The items of a history or config message: key or nested key, and a value in JSON."""
    row: dict[str, Any] = {}
    for field, content in fields(message):
        if field == 1 and isinstance(content, bytes):
            key, value = _item(content)
            if key:
                row[key] = value
    return row


def _item(message: bytes) -> tuple[str, Any]:
    key, nested, value = "", [], None
    for field, content in fields(message):
        if not isinstance(content, bytes):
            continue
        if field == 1:
            key = content.decode(errors="replace")
        elif field == 2:
            nested.append(content.decode(errors="replace"))
        elif field == 16:
            value = _json(content)
    return key or "/".join(nested), value


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _records(data: Bytes, reading: Reading) -> Iterator[bytes]:
    """Records put together from their fragments; a torn block costs only what it holds."""
    parts: list[bytes] = []
    for n, block in enumerate(_blocks(data)):
        at = _HEADER if n == 0 else 0
        while at + _HEADER <= len(block):
            crc, length, kind = struct.unpack_from("<IHB", block, at)
            at += _HEADER
            content = block[at : at + length]
            at += length
            if kind == 0 and length == 0:
                break
            if len(content) < length or kind > _LAST or crc != _checksum(kind, content):
                reading.torn += 1
                parts = []
                break
            if kind in (_FULL, _FIRST):
                parts = []
            parts.append(content)
            if kind in (_FULL, _LAST):
                yield b"".join(parts)
                parts = []
    reading.torn += bool(parts)


def _blocks(data: Bytes) -> Iterator[bytes]:
    rest = b""
    for part in data.blocks():
        rest += part
        while len(rest) >= _BLOCK:
            yield rest[:_BLOCK]
            rest = rest[_BLOCK:]
    if rest:
        yield rest


def _checksum(kind: int, content: bytes) -> int:
    """The CRC-32 of W&B's own writer, over the type byte and the content."""
    return zlib.crc32(content, zlib.crc32(bytes([kind])))
