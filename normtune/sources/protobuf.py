"""The wire format of protobuf, as far as event files and W&B files need it."""

from __future__ import annotations

import struct
from collections.abc import Iterator

_FIXED = {1: 8, 5: 4}


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and content of each field: an int for varints, bytes for all others.

    Raises:
        ValueError: If the message is torn.
    """
    at, size = 0, len(message)
    while at < size:
        tag, at = varint(message, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = varint(message, at)
            yield number, value
            continue
        if kind == 2:
            length, at = varint(message, at)
        elif kind in _FIXED:
            length = _FIXED[kind]
        else:
            break
        if at + length > size:
            break
        yield number, message[at : at + length]
        at += length
    if at != size:
        error = "torn message"
        raise ValueError(error)


def varint(message: bytes, at: int) -> tuple[int, int]:
    """The varint at `at`, and where the next field begins."""
    value = shift = 0
    while at < len(message) and shift < 64:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    error = "torn varint"
    raise ValueError(error)


def signed(value: int) -> int:
    """An int64 from the unsigned number on the wire."""
    return value - (1 << 64) if value >= 1 << 63 else value


def packed(content: bytes, kind: str) -> list[float]:
    """Numbers of a packed field of `kind`, a format character of struct."""
    size = struct.calcsize(kind)
    return list(
        struct.unpack(f"<{len(content) // size}{kind}", content[: len(content) // size * size])
    )
