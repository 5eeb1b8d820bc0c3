"""Workers and controllers as processes of their own, forked from one that has loaded it all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from small_study import gone

# Loading Optuna and its database layer takes a second of a core, forking a process that has none.
FORKS = """
import json, os, signal, sys, traceback
import optuna, psycopg, sqlalchemy.dialects.postgresql, scipy.stats
from normtune import cli, search, worker
from normtune.storages import VARIABLE

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    given = json.loads(line)
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(given["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    os.environ |= given["environment"]
    os.chdir(given["folder"])
    sys.argv = ["normtune", *given["arguments"]]
    code = 1
    try:
        exec(given["before"])
        cli.main()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    print(f"exit code {code}", flush=True)
    os._exit(0)
os._exit(0)  # what it has loaded takes a second to leave
"""


class Process:
    """A command of normtune that runs on, as a user would start it on a machine."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log = pid, log

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def says(self, words: str, seconds: float = 30.0) -> str:
        """Wait until it has said something; all that it said."""
        until(lambda: words in self.text or gone(self.pid, 0.01), seconds)
        assert words in self.text, self.text
        return self.text

    def ends(self, seconds: float = 30.0) -> str:
        """Wait until it has ended; all that it said."""
        assert gone(self.pid, seconds), self.text
        return self.text


class Several:
    """Starts commands of normtune side by side, and ends those that are left."""

    def __init__(self, folder: Path, url: str, forks: subprocess.Popen[str]) -> None:
        self._folder = folder
        self._environment = {"NORMTUNE_STORAGE": url}
        self._started: list[Process] = []
        self._forks = forks

    def start(self, *arguments: object, before: str = "", **environment: str) -> Process:
        """A command of normtune, in the folder of the test, with the storage in its environment."""
        log = self._folder / f"{arguments[0]}-{len(self._started)}.log"
        given = {
            "arguments": [str(a) for a in arguments],
            "before": before,
            "environment": self._environment | environment,
            "folder": str(self._folder),
            "log": str(log),
        }
        self._forks.stdin.write(json.dumps(given) + "\n")
        self._forks.stdin.flush()
        process = Process(int(self._forks.stdout.readline()), log)
        self._started.append(process)
        return process

    def end(self) -> None:
        for process in self._started:
            with suppress(ProcessLookupError):
                process.signal(signal.SIGKILL)


@contextmanager
def forking() -> Iterator[subprocess.Popen[str]]:
    """The process that the others are forked from."""
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as forks:
        try:
            yield forks
        finally:
            forks.stdin.close()
            forks.wait(timeout=10)


def until(what: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.02)
