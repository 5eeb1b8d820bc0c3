"""Which reader a file needs, told from its first bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from normtune.errors import RecordError
from normtune.sources import csv_logs, json_logs, mlflow, tensorboard, text_logs, wandb
from normtune.sources.streams import Bytes
from normtune.sources.tables import Asked, Reading

SAMPLE = 1 << 16
_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?\s*[,\]]|(?:NaN|null)\b")
FIRST_LINE = 1 << 21  # a config object of mmcv's may fill the first line of JSON Lines
_BINARY = {
    b"SQLite format 3\0": "an SQLite database; export the metric to CSV and give that",
    b"PK\x03\x04": "a zip archive, such as a checkpoint; give the run's log",
    b"PAR1": "a Parquet file; convert it with pandas and pass the column to normtune.suggest",
    b"\x93NUMPY": "a numpy file; pass numpy.load(...) to normtune.suggest",
    b"\x80\x02": "a pickle, which normtune does not open; give the run's log",
    b"\x80\x04": "a pickle, which normtune does not open; give the run's log",
    b"\x80\x05": "a pickle, which normtune does not open; give the run's log",
    b"%PDF": "a PDF; give the run's log",
    b"\x89HDF": "an HDF5 file; pass the dataset to normtune.suggest",
    b"\x28\xb5\x2f\xfd": "zstd-compressed; unpack it first",
}


def start_of(data: Bytes) -> bytes:
    """The first bytes of a file.

    Raises:
        RecordError: If it is missing, a folder or empty.
    """
    start = data.start(SAMPLE)
    if not start.strip(b" \t\r\n\0\xef\xbb\xbf"):
        message = f"{data.name} is empty: no step was logged in it"
        raise RecordError(message)
    return start


def reading(files: Sequence[Bytes], asked: Asked) -> Reading:
    """Read a file with the reader that its content asks for.

    Raises:
        RecordError: If it is no log.
    """
    data = files[0]
    start = start_of(data)
    if tensorboard.looks_like_events(start):
        return tensorboard.read(files, asked)
    if start.startswith(wandb.MAGIC):
        return wandb.read(data, asked)
    _refuse_binary(start, data)
    if mlflow.looks_like_metric(start):
        return mlflow.read(data, asked)
    kind = _json_kind(start, data)
    if kind == "lines":
        return json_logs.read_lines(data, asked)
    if kind == "document":
        return json_logs.read_document(data, asked)
    if csv_logs.looks_like_csv(_text(start)):
        return csv_logs.read(data, asked)
    return text_logs.read(data, asked)


def _refuse_binary(start: bytes, data: Bytes) -> None:
    for magic, what in _BINARY.items():
        if start.startswith(magic):
            message = f"{data.name} is {what}"
            raise RecordError(message)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return
    text = b"\t\n\r\x0b\x0c\x1b\x08" + bytes(range(32, 256))
    odd = len(start.translate(None, text))
    if odd > 0.05 * len(start):
        message = (
            f"{data.name} is binary and of no kind that normtune knows; give the run's log, "
            "such as trainer_state.json, metrics.csv or the console text"
        )
        raise RecordError(message)


def _text(start: bytes) -> bytes:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return start.decode("utf-16", errors="replace").encode(errors="replace")
    return start.removeprefix(b"\xef\xbb\xbf")


def _json_kind(start: bytes, data: Bytes) -> str:
    """Whether the file is JSON "lines", a JSON "document" or "" for neither."""
    text = _text(start).lstrip()
    if not text.startswith((b"{", b"[")):
        return ""
    first, newline, rest = text.partition(b"\n")
    if not newline:
        first, newline, rest = _text(data.start(FIRST_LINE)).lstrip().partition(b"\n")
    if _parses(first):
        more = rest.strip() if len(rest) < 1000 else rest[:1000].strip()
        return "lines" if more.startswith(b"{") else "document"
    return "document" if _opens_document(text) else ""


def _parses(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict | list)
    except (ValueError, RecursionError):
        return False


def _opens_document(text: bytes) -> bool:
    """A brace or bracket and what JSON allows after it; a line such as ``[2022-..`` has not."""
    inner = text[1:].lstrip()
    if text.startswith(b"{"):
        return inner.startswith((b'"', b"}"))
    return inner.startswith((b"{", b"[", b'"', b"]")) or _NUMBER.match(inner) is not None
