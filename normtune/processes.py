"""Runs as processes of their own: started where that is cheap, and ended for certain."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from types import ModuleType
from typing import TYPE_CHECKING

from normtune import storages
from normtune.tasks import OUTPUT, Outcome, Task

if TYPE_CHECKING:
    import psutil

# What every training needs and what takes seconds to import; optimizers import torch._dynamo.
PRELOAD = ["torch", "torch._dynamo", "numpy"]
GRACE_SECONDS = 2.0  # between the polite signal and the last one
MOST_ROUNDS = 100  # of ending what runs; each finds what was started during the one before
LINGER_SECONDS = 10.0  # how long a run may take to end after its result is written


@cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def warm_up() -> None:
    """Start the fork server, which imports torch while the caller does other things."""
    from multiprocessing.forkserver import ensure_running

    _context()
    with _without_main():
        ensure_running()


class Child:
    """A process that carries out one task.

    Args:
        task: The task; its folder is made here.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self._started = time.monotonic()
        self._why_ended = ""
        task.folder.mkdir(parents=True, exist_ok=True)
        # A command imports torch for itself, so that its process starts from a bare Python.
        context = multiprocessing.get_context("spawn") if task.command else _context()
        job = "normtune.commands:carry_out" if task.command else "normtune.run:carry_out"
        self._process = context.Process(target=_in_child, args=(task, job))
        with _without_main():
            self._process.start()

    @property
    def pid(self) -> int:
        """The process id, which is the id of its process group too."""
        return self._process.pid or 0

    @property
    def running(self) -> bool:
        """Whether the process has not ended yet."""
        return self._process.is_alive()

    @property
    def seconds(self) -> float:
        """How long ago it was started."""
        return time.monotonic() - self._started

    def give_up(self, why: str) -> None:
        """End it and all that it started; its outcome is a crash for this reason."""
        self._why_ended = why
        end_all([self])

    def outcome(self) -> Outcome:
        """The outcome of a child that has ended; what it left behind is ended too."""
        self._process.join()
        self._signal(signal.SIGKILL)
        return Outcome.load(self.task.folder) or self._without_result()

    def _without_result(self) -> Outcome:
        if self._why_ended:
            return Outcome("crashed", reason=self._why_ended, seconds=round(self.seconds, 3))
        code = self._process.exitcode or 0
        if code == -signal.SIGKILL:
            return Outcome("crashed", reason="killed (out of memory?)")
        if code < 0:
            return Outcome("crashed", reason=f"killed by {signal.Signals(-code).name}")
        return Outcome("crashed", reason=f"ended with exit code {code} and left no result")

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):  # it may not lead its group yet
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if self._process.is_alive():
                    os.kill(self.pid, number)


def first_to_end(children: Sequence[Child], timeout: float | None = None) -> list[Child]:
    """Wait until at least one child has ended; those that have."""
    ended = wait([child._process.sentinel for child in children], timeout)
    return [child for child in children if child._process.sentinel in ended]


def end_all(children: Sequence[Child]) -> None:
    """End the children and all that they started: politely, then for certain."""
    for child in children:
        child._signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for child in children:
        child._process.join(max(0.0, deadline - time.monotonic()))
    for child in children:
        if child.running:  # on a busy machine it may not have come to it
            end_descendants(child.pid)
        child._signal(signal.SIGKILL)
        child._process.join()


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keep multiprocessing from importing the caller's script again in every child.

    A script that calls `normtune.search` outside of ``if __name__ == "__main__"`` would start
    itself again.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _in_child(task: Task, job: str) -> None:
    os.setsid()  # a group of its own: Ctrl-C goes to the controller, which ends the group
    os.environ.pop(storages.VARIABLE, None)  # it may hold a password, and loggers keep both
    del sys.argv[1:]
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _redirect(task)
    faulthandler.enable()
    module, _, function = job.partition(":")
    getattr(importlib.import_module(module), function)(task)
    # A thread that the training left behind must not hold the study up.
    timer = threading.Timer(LINGER_SECONDS, os._exit, [0])
    timer.daemon = True
    timer.start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        end_descendants()
        os.killpg(0, signal.SIGKILL)


def end_descendants(pid: int | None = None) -> None:
    """End all that a process started, sessions of their own (torchrun's workers) included.

    Args:
        pid: The process; None is this one.
    """
    import psutil

    for _ in range(MOST_ROUNDS):  # one that is about to start another is seen before it has
        try:
            alive = [p for p in psutil.Process(pid).children(recursive=True) if _runs(p)]
        except psutil.Error:  # it is gone, and left nothing that could be found by it
            return
        if not alive:
            return
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.01)


def _runs(process: psutil.Process) -> bool:
    import psutil

    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _redirect(task: Task) -> None:
    """Parallel runs would write over each other, and over the progress bar."""
    sys.stdout.flush()
    sys.stderr.flush()
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    descriptor = os.open(task.folder / OUTPUT, flags, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
