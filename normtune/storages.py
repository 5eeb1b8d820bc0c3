"""Storage URLs: whose turn it is, who may share one, how it is opened, and how it is shown."""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normtune.errors import StudyError

if TYPE_CHECKING:
    import optuna
    import sqlalchemy

    from normtune.patience import Patient

# A command line is shown to every user of a machine by ps; an environment only to its own user.
VARIABLE = "NORMTUNE_STORAGE"
EXAMPLE = "postgresql+psycopg://user:password@host:5432/database"
LOCK_SECONDS = 60  # how long SQLite waits for another process
RECYCLE_SECONDS = 1800  # a firewall drops connections that were idle for an hour, and says nothing
ATTEMPTS = 3  # to make the tables, where several processes start at once
SHORTEST_SECRET = 4  # characters; shorter ones are parts of any text
DRIVERS = {
    "psycopg": "'normtune[postgres]'",
    "psycopg2": "'normtune[postgres]' (and write postgresql+psycopg://)",
    "MySQLdb": "pymysql (and write mysql+pymysql://)",
}
# Without an answer from the machine itself, a connection would wait for hours (libpq's words).
LIBPQ = {
    "connect_timeout": 10,
    "keepalives_idle": 60,
    "keepalives_interval": 10,
    "keepalives_count": 6,
    "tcp_user_timeout": 120_000,
}
# Optuna compares heartbeats as local times, which differ by machine and jump twice a year.
CLOCKS = {"postgresql": "SET TIME ZONE 'UTC'", "mysql": "SET time_zone = '+00:00'"}


def chosen(given: str | None) -> str | None:
    """The storage of a flag or a study file; without one that of the environment."""
    return given or os.environ.get(VARIABLE) or None


def is_server(url: str) -> bool:
    """Whether a storage is a server, which processes on many machines may use at a time.

    >>> is_server("postgresql+psycopg://host/database"), is_server("sqlite:///study.db")
    (True, False)
    """
    return "://" in url and not url.startswith(("sqlite", "journal"))


def check_shared(url: str, what: str) -> None:
    """Refuse a storage that only one process may use.

    Args:
        url: The storage.
        what: Who would share it, at the start of the sentence.

    Raises:
        StudyError: With what to use instead.
    """
    if is_server(url):
        return
    kind = "a SQLite file" if url.startswith("sqlite") else "a journal file"
    message = (
        f"{what} needs a storage that several processes can use at a time, and "
        f"{masked(url)} is {kind}: give a PostgreSQL server by {VARIABLE}={EXAMPLE}. On one "
        "machine, or with srun or ssh in the study's command, a single normtune search with "
        "--jobs N needs no server"
    )
    raise StudyError(message)


# --- what is shown ----------------------------------------------------------------------------


def masked(url: str) -> str:
    """A storage URL without its password, in either place where one may stand.

    >>> masked("postgresql://me:secret@host/database?password=secret")
    'postgresql://me:***@host/database'
    """
    bare = re.sub(r"(://[^:/?@]*):.*@", r"\1:***@", url, flags=re.DOTALL)
    return bare.partition("?")[0]


def scrubbed(text: str, url: str) -> str:
    """A text without the password of a storage URL."""
    text = text.replace(url, masked(url))
    for secret in _secrets(url):
        text = text.replace(secret, "***")
    return text


def _secrets(url: str) -> set[str]:
    import sqlalchemy

    found: set[str] = set()
    with suppress(sqlalchemy.exc.ArgumentError, ValueError):
        parts = sqlalchemy.engine.make_url(url)
        query = [str(v) for k, v in parts.query.items() if "pass" in k or "pwd" in k]
        found = {str(parts.password or ""), *query}
    found |= set(re.findall(r"://[^:/?@]*:(.*)@", url, flags=re.DOTALL))
    return {secret for secret in found if len(secret) >= SHORTEST_SECRET}


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what a database driver says into one line, without the password."""
    import optuna
    import sqlalchemy

    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        message = f"cannot use the storage {masked(url)}: {reason_of(error, url)}"
        raise StudyError(message) from None


def reason_of(error: BaseException, url: str) -> str:
    """What a driver said first, on one line."""
    while error.__cause__ is not None or getattr(error, "orig", None) is not None:
        error = getattr(error, "orig", None) or error.__cause__ or error
        if isinstance(error, OSError):
            break
    lines = scrubbed(str(error), url).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna says nothing about single trials meanwhile."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(level, optuna.logging.ERROR))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)


# --- opening ----------------------------------------------------------------------------------


def studies_in(url: str) -> tuple[str, ...]:
    """The names of the studies in a storage; nothing is made by asking.

    Raises:
        StudyError: If the storage cannot be reached.
    """
    import sqlalchemy

    file = re.fullmatch(r"sqlite:///([^?]+).*", url)
    if file and not Path(file[1]).exists():
        return ()
    with explained(url):
        engine = _engine(url)
        try:
            if not sqlalchemy.inspect(engine).has_table("studies"):
                return ()
            names = sqlalchemy.table("studies", sqlalchemy.column("study_name"))
            with engine.connect() as connection:
                return tuple(connection.execute(sqlalchemy.select(names)).scalars())
        finally:
            engine.dispose()


def exists(url: str, name: str) -> bool:
    """Whether a storage holds the study; no file and no table is made by asking."""
    return name in studies_in(url)


def opened(url: str) -> optuna.storages.BaseStorage:
    """A storage for the single process that uses it, or a `Patient` one on a server.

    Raises:
        StudyError: If it cannot be used: the reason in one line.
    """
    _check(url)
    with quiet(), explained(url):
        return _served(url) if is_server(url) else _rdb(url)


def _rdb(url: str) -> optuna.storages.RDBStorage:
    import optuna

    # Optuna fills in {SCHEMA_VERSION}; any other brace belongs to the user.
    template = url.replace("{", "{{").replace("}", "}}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.storages.RDBStorage(
            template, engine_kwargs=_options(url), heartbeat_interval=60 if is_server(url) else None
        )


def _served(url: str) -> Patient:
    import sqlalchemy

    from normtune.patience import Patient

    for attempt in range(1, ATTEMPTS + 1):
        try:
            with _driver_named(url):
                storage = _rdb(url)
            break
        except sqlalchemy.exc.DBAPIError as error:
            # Two that make the tables of an empty database at once: one of them is refused.
            if attempt == ATTEMPTS or isinstance(error, sqlalchemy.exc.OperationalError):
                raise
            time.sleep(0.3 * attempt)
    _use_utc(storage.engine)
    return Patient(storage, lambda error: reason_of(error, url))


def _engine(url: str) -> sqlalchemy.Engine:
    import sqlalchemy

    _check(url)
    with _driver_named(url):
        return sqlalchemy.create_engine(url, **_options(url))


@contextmanager
def _driver_named(url: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        name = getattr(error, "name", None) or getattr(error.__cause__, "name", None) or ""
        package = DRIVERS.get(name, name or "its driver")
        message = f"the storage {masked(url)} needs a Python package: pip install {package}"
        raise StudyError(message) from None


def _options(url: str) -> dict[str, Any]:
    """For `sqlalchemy.create_engine`; each of many workers holds one connection at rest."""
    if url.startswith("sqlite"):
        return {"connect_args": {"timeout": LOCK_SECONDS}}
    options: dict[str, Any] = {"pool_pre_ping": True, "pool_recycle": RECYCLE_SECONDS}
    options |= {"pool_size": 1, "max_overflow": 4}
    if url.startswith("postgresql") and _driver(url) in ("psycopg", "psycopg2"):
        query = _query(url)
        options["connect_args"] = {k: v for k, v in LIBPQ.items() if k not in query}
    return options


def _driver(url: str) -> str:
    import sqlalchemy

    return str(sqlalchemy.engine.make_url(url).get_driver_name())


def _query(url: str) -> set[str]:
    import sqlalchemy

    return set(sqlalchemy.engine.make_url(url).query)


def _use_utc(engine: sqlalchemy.Engine) -> None:
    """Every connection from now on reads the server's clock as UTC."""
    import sqlalchemy

    statement = CLOCKS.get(engine.dialect.name)
    if statement is None:
        return

    def connected(connection: Any, _: object) -> None:
        cursor = connection.cursor()
        cursor.execute(statement)
        cursor.close()
        connection.commit()

    sqlalchemy.event.listen(engine, "connect", connected)
    engine.dispose()  # the connections made before


def _check(url: str) -> None:
    """Refuse URLs that a driver would misread, or explain with a part of the password."""
    import sqlalchemy

    if _is_journal(url):
        message = (
            f"{masked(url)} is a journal file, which one torn line makes unreadable for Optuna; "
            f"give a SQLite file (sqlite:///study.db), or for many machines {EXAMPLE}"
        )
        raise StudyError(message)
    with explained(url):
        try:
            parts = sqlalchemy.engine.make_url(url)
            torn = is_server(url) and "@" in f"{parts.host or ''}{parts.database or ''}"
        except ValueError:  # a port that is no number
            torn = True
    if torn:
        message = (
            f"cannot read the storage URL {masked(url)}: it must be like {EXAMPLE}, and @ : / in a "
            "password are written %40 %3A %2F"
        )
        raise StudyError(message)


def _is_journal(url: str) -> bool:
    named = "://" not in url and Path(url).suffix in (".log", ".journal")
    return named or url.startswith("journal")
