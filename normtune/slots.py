"""The trainings that run on this machine: so many at a time, ended when they take too long."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from normtune import processes
from normtune.format import duration
from normtune.processes import Child
from normtune.tasks import OUTPUT, Outcome, Task

POLL_SECONDS = 0.2  # between looks at what running trainings print


class Slots:
    """Starts trainings as processes, and waits for them.

    Args:
        n: How many run at a time.
        limit: How many seconds one may take; None sets no limit.
        show: Is called with a training's number and each whole line that it prints.
    """

    def __init__(
        self, n: int, limit: float | None = None, show: Callable[[int, str], None] | None = None
    ) -> None:
        self._n = n
        self._limit = math.inf if limit is None else limit
        self._show = show
        self._children: dict[int, Child] = {}
        self._shown: dict[int, int] = {}  # bytes of each training's output

    def __len__(self) -> int:
        return len(self._children)

    @property
    def free(self) -> int:
        """How many more may start."""
        return self._n - len(self._children)

    @property
    def seconds(self) -> list[float]:
        """How long each of them has been running."""
        return [child.seconds for child in self._children.values()]

    def start(self, number: int, task: Task) -> None:
        """Start a training, on a part of the GPUs that no other uses."""
        used = {child.task.slot for child in self._children.values()}
        slot = next(i for i in range(self._n) if i not in used)
        self._children[number] = Child(replace(task, slot=slot, slots=self._n))

    def wait(self, seconds: float | None = None) -> list[tuple[int, Task, Outcome]]:
        """Wait until a training has ended, or has taken too long.

        Args:
            seconds: How long at most; None waits for an end.

        Returns:
            Number, task and outcome of those that have ended.
        """
        until = math.inf if seconds is None else time.monotonic() + seconds
        while self._children:
            children = list(self._children.values())
            ended = processes.first_to_end(children, self._pause(until))
            self._show_output()
            late = [c for c in children if c not in ended and c.seconds >= self._limit]
            for child in late:
                child.give_up(f"took longer than the time limit of {duration(self._limit)}")
            if ended or late or time.monotonic() >= until:
                return [self._taken(child) for child in (*ended, *late)]
        time.sleep(0.0 if seconds is None else seconds)
        return []

    def _pause(self, until: float) -> float | None:
        """How long to wait before the next look."""
        pause = min(until - time.monotonic(), self._limit - max(self.seconds) + 0.01)
        pause = min(pause, POLL_SECONDS) if self._show else pause
        return None if pause == math.inf else max(0.0, pause)

    def _taken(self, child: Child) -> tuple[int, Task, Outcome]:
        number = next(n for n, c in self._children.items() if c is child)
        outcome = child.outcome()
        del self._children[number]
        return number, child.task, outcome

    def _show_output(self) -> None:
        """Show the whole lines that trainings have printed since the last look."""
        if self._show is None:
            return
        for number, child in self._children.items():
            with suppress(OSError), (child.task.folder / OUTPUT).open("rb") as file:
                file.seek(self._shown.get(number, 0))
                text, newline, _ = file.read().rpartition(b"\n")
                self._shown[number] = self._shown.get(number, 0) + len(text) + len(newline)
                for line in text.decode(errors="replace").splitlines():
                    self._show(number, line)

    def end(self) -> None:
        """End all trainings and what they started."""
        processes.end_all(list(self._children.values()))
        self._children.clear()
