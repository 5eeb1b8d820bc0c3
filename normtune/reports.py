"""Which report a source gets: a study its verdict, a record or a log its suggestion."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from normtune import contents, records, sources
from normtune.errors import NormtuneError, RecordError
from normtune.pages import FORMS, SUFFIXES
from normtune.suggestion import suggest

if TYPE_CHECKING:
    from normtune.contents import Content
    from normtune.records import NormRecord

STUDIES = (".yaml", ".yml")
PAGE = Path("report.html")


@dataclass(frozen=True)
class Asked:
    """What a user asked of a report; the names are those of the command line's options.

    Attributes:
        rule: The rule of the suggestion.
        skip: Steps to leave out at the start.
        current: The max_norm in use today.
        key: The key, column or tag of the norm.
        series: The series of a record.
        attempt: Which run of a file that holds several.
        optimizer: The optimizer, where the log does not say.
        storage: An Optuna storage URL, for a study.
    """

    rule: str = "p90"
    skip: str = "0"
    current: float | None = None
    key: str | None = None
    series: str | None = None
    attempt: int | None = None
    optimizer: str | None = None
    storage: str | None = None

    @property
    def given(self) -> dict[str, object]:
        """What differs from the defaults."""
        return {k: v for k, v in asdict(self).items() if v != getattr(Asked, k)}


def content_of(
    source: str | BinaryIO, asked: Asked = Asked(), *, made_by: Mapping[str, object] | None = None
) -> Content:
    """The content of the report on a record, a log or a study.

    Args:
        source: A study file (``.yaml``), or whatever `sources.read` takes.
        asked: The options.
        made_by: Further options of the command that makes the report again.

    Raises:
        NormtuneError: If there is nothing to report on.
        ValueError: If an option does not fit the source.
    """
    name = source if isinstance(source, str) else "-"
    if Path(name).suffix.lower() in STUDIES:
        return _of_study(name, asked, made_by or {})
    if asked.storage is not None:
        message = f"storage belongs to a study file, but {name} is none"
        raise ValueError(message)
    record = sources.read(source, key=asked.key, series=asked.series, attempt=asked.attempt)
    skip = int(asked.skip) if asked.skip.strip().isdecimal() else asked.skip
    suggestion = suggest(
        record, rule=asked.rule, skip=skip, current=asked.current, optimizer=asked.optimizer
    )
    command = _command(name, asked.given | dict(made_by or {}))
    return contents.of_suggestion(suggestion, command=command, earlier=_earlier(record, asked))


def _of_study(path: str, asked: Asked, made_by: Mapping[str, object]) -> Content:
    from normtune import stored
    from normtune.storages import masked

    options = asked.given
    wrong = [key for key in options if key != "storage"]
    if wrong:
        message = f"{wrong[0]} is for a record or a log; {path} is a study, which names its own"
        raise ValueError(message)
    result = stored.load_result(path, storage=asked.storage)
    suggestion = stored.load_suggestion(path, storage=asked.storage)
    shown = {k: masked(str(v)) for k, v in options.items()} | dict(made_by)
    return contents.of_result(result, command=_command(path, shown), suggestion=suggestion)


def _command(source: str, options: Mapping[str, object]) -> str:
    given = [part for key, v in options.items() for part in (f"--{key}", str(v))]
    return shlex.join(["normtune", "report", source, *given])


def _earlier(record: NormRecord, asked: Asked) -> tuple[NormRecord, ...]:
    """Earlier starts of the run, where its record tells of any."""
    told = any("start" in note or "repeated" in note for note in record.origin.notes)
    own = record.origin.kind == "normtune record" and Path(record.origin.path).is_file()
    if not (told and own) or asked.attempt is not None:
        return ()
    with suppress(RecordError):
        return records.starts(record.origin.path, series=record.series)[:-1]
    return ()


def form_of(form: str | None, output: Path | None) -> str:
    """The form of a report: the one asked for, else that of the file's suffix, else HTML.

    >>> form_of(None, Path("a.md")), form_of(None, None)
    ('markdown', 'html')

    Raises:
        ValueError: If there is no such form.
    """
    if form is not None and form not in FORMS:
        message = f"format must be one of {', '.join(FORMS)} but got {form!r}"
        raise ValueError(message)
    return form or (SUFFIXES.get(output.suffix.lower(), "html") if output else "html")


def check(output: Path, *, source: str) -> None:
    """Refuse a file that no report of `source` can be written to, before it is made.

    Raises:
        ValueError: If `output` is the source.
        NormtuneError: If its folder is missing.
    """
    if output.exists() and Path(source).exists() and output.samefile(source):
        message = f"the report would overwrite its source {source}; give another file with -o"
        raise ValueError(message)
    if not output.parent.is_dir():
        message = f"cannot write the report {output}: no such folder: {output.parent}"
        raise NormtuneError(message)


def write(text: str, output: Path) -> None:
    """Write a report to a file, as a whole or not at all.

    Raises:
        NormtuneError: If the file cannot be written.
    """
    unfinished = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8", errors="replace")
        unfinished.replace(output)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        message = f"cannot write the report {output}: {error.strerror or error}"
        raise NormtuneError(message) from None
