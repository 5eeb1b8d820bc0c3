"""A PostgreSQL server of the tests' own: a cluster in a temporary folder, on loopback."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

USER = "tester"
PASSWORD = "s3cret/w@rd%"  # noqa: S105 - of a server that lives as long as the tests
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "fsync": "off",
    "shared_buffers": "16MB",
    "max_connections": "60",
    "timezone": "Europe/Berlin",  # not UTC: heartbeats must not depend on it
}


def why_absent() -> str:
    """Why no server can be started here; empty where one can."""
    if _programs() is None:
        return "no PostgreSQL server is installed (Debian: apt-get install postgresql)"
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "no driver for PostgreSQL: pip install 'normtune[postgres]'"
    return ""


def _programs() -> Path | None:
    """The folder of initdb and postgres."""
    packaged = Path("/usr/lib/postgresql").glob("[0-9]*/bin/initdb")
    found = sorted(packaged, key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("initdb")
    every = [*([Path(on_path).resolve()] if on_path else []), *found]
    return every[-1].parent if every else None


class Server:
    """A server with a cluster in `folder`; it refuses root, so that root starts it as postgres."""

    def __init__(self, folder: Path) -> None:
        programs = _programs()
        assert programs is not None
        self._programs, self._folder = programs, folder
        self._who = {"user": "postgres", "group": "postgres", "extra_groups": []}
        self._who = self._who if os.geteuid() == 0 else {}
        self._process: subprocess.Popen[bytes] | None = None
        self.port = _free_port()
        self._databases = 0

    def make(self) -> None:
        """Make the cluster, with a superuser who has a password."""
        if self._who:
            shutil.chown(self._folder, "postgres", "postgres")
        secret = self._folder / "password"
        secret.write_text(PASSWORD)
        options = ["-U", USER, "--auth=scram-sha-256", f"--pwfile={secret}", "--no-sync"]
        self._run("initdb", "-D", "data", "-E", "UTF8", "--locale=C", *options)

    def start(self) -> None:
        """Start the server and wait until it answers."""
        settings = [f"--{key}={value}" for key, value in SETTINGS.items()]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", "data", f"--port={self.port}", *settings],
                cwd=self._folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._who,
            )
        deadline = time.monotonic() + 30
        while not self._answers():
            assert self._process.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < deadline, (self._folder / "log").read_text()
            time.sleep(0.05)

    def stop(self, *, how: signal.Signals = signal.SIGINT) -> None:
        """End it: SIGINT drops all connections, SIGQUIT leaves the rest to the next start."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(timeout=30)
            self._process = None

    def database(self) -> str:
        """The URL of a new, empty database."""
        self._databases += 1
        name = f"d{self._databases}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def url(self, name: str, password: str = PASSWORD) -> str:
        """The URL of a database."""
        return (
            f"postgresql+psycopg://{USER}:{quote(password, safe='')}@127.0.0.1:{self.port}/{name}"
        )

    def execute(self, statement: str, database: str = "postgres") -> list[tuple]:
        """The rows of a statement."""
        import psycopg

        with self._connected(database) as connection:
            cursor = connection.execute(statement)
            with contextlib.suppress(psycopg.ProgrammingError):
                return cursor.fetchall()
        return []

    def _connected(self, database: str):
        import psycopg

        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user=USER,
            password=PASSWORD,
            dbname=database,
            autocommit=True,
            connect_timeout=5,
        )

    def _answers(self) -> bool:
        import psycopg

        try:
            self._connected("postgres").close()
        except psycopg.OperationalError:
            return False
        return True

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [self._programs / program, *arguments],
            cwd=self._folder,
            check=True,
            capture_output=True,
            timeout=120,
            **self._who,
        )


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """A server that ends with the block, and leaves nothing; a test without one is skipped."""
    if why_absent():
        pytest.skip(why_absent())
    folder = Path(tempfile.mkdtemp(prefix="normtune-postgres-"))  # pytest's own is closed to others
    server = Server(folder)
    try:
        server.make()
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
