"""Norms of a run: `NormRecord`, and the JSONL file that keeps them and only grows."""

from normtune.records.assembly import last_steps, starts
from normtune.records.lines import (
    FORMAT_VERSION,
    SUFFIX,
    dumps,
    header,
    is_record,
    may_be_record,
    row,
    strict,
)
from normtune.records.record import ANONYMOUS, SCHEDULE, ClipSide, Finding, NormRecord, Origin
from normtune.records.stores import FileStore, MemoryStore, RecordWriter, Row

__all__ = [
    "ANONYMOUS",
    "FORMAT_VERSION",
    "SCHEDULE",
    "SUFFIX",
    "ClipSide",
    "FileStore",
    "Finding",
    "MemoryStore",
    "NormRecord",
    "Origin",
    "RecordWriter",
    "Row",
    "dumps",
    "header",
    "is_record",
    "last_steps",
    "may_be_record",
    "row",
    "starts",
    "strict",
]
