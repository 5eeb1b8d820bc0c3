"""The workers of a study, as its controller sees them: who lives, what waits, what came back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from normtune import parcels, presence
from normtune.ledger import NORMS, Queued
from normtune.tasks import RECORD, Outcome

if TYPE_CHECKING:
    from normtune.ledger import Ledger
    from normtune.plan import Planned

# A worker that lives says so within a heartbeat after the server is back.
BEATS_TO_COME_BACK = 1.5
FIRST_LOOK, LONGEST_LOOK = 0.2, 2.0  # seconds between looks at the study


@dataclass(frozen=True)
class Look:
    """What has happened to the runs of workers since the last look.

    Attributes:
        taken: Runs that a worker has begun.
        ended: Runs that came to an end.
        lost: Runs that their worker gave back, or left by dying.
        joined: Whether there are more workers than before.
    """

    taken: tuple[Queued, ...]
    ended: tuple[Queued, ...]
    lost: tuple[Queued, ...]
    joined: bool

    @property
    def calls_for_plan(self) -> bool:
        """Whether other runs may be planned now than before."""
        return bool(self.ended or self.lost or self.joined)


class Crew:
    """The workers of a study on a server.

    Args:
        ledger: The study.
        beat: Seconds between the heartbeats of a worker.

    Attributes:
        live: How many workers live.
    """

    def __init__(self, ledger: Ledger, beat: float) -> None:
        self.live = 0
        self._ledger = ledger
        self._beat = beat
        self._open = {q.number: q for q in ledger.queued() if q.state == "running"}
        self._silent: dict[int, float] = {}  # runs that were taken by nobody knows whom, and when
        self._judged = time.monotonic()
        self._quiet_since = time.monotonic()

    @property
    def open(self) -> int:
        """How many runs wait or are trained."""
        return len(self._open)

    def room(self, *, at_least: int = 0) -> int:
        """How many more runs may be entered: one for each worker, since asks are adaptive."""
        return max(self.live, at_least) - len(self._open)

    def enqueue(self, planned: Planned, *, steps: int | None = None) -> Queued:
        """Enter a run that waits for a worker; with `steps` a warm-up."""
        number, folder = self._ledger.enqueue(planned, steps=steps)
        queued = Queued(number, folder, "waiting", "")
        self._open[number] = queued
        return queued

    @property
    def pause(self) -> float:
        """Seconds to wait before the next look: the longer, the longer nothing has happened."""
        quiet = time.monotonic() - self._quiet_since
        return min(FIRST_LOOK + 0.1 * quiet, LONGEST_LOOK)

    def look(self) -> Look:
        """What has happened since the last look."""
        self._judge()
        now = {q.number: q for q in self._ledger.queued() if q.number in self._open}
        moved = [q for number, q in now.items() if q != self._open[number]]
        self._open = {n: q for n, q in now.items() if q.state in ("waiting", "running")}
        live = len(presence.workers(self._ledger.facts(), self._ledger.now()))
        found = Look(
            taken=tuple(q for q in moved if q.state == "running" and q.worker),
            ended=tuple(q for q in moved if q.state == "ended"),
            lost=tuple(q for q in moved if q.state == "interrupted"),
            joined=live > self.live,
        )
        self.live = live
        if moved or found.joined:
            self._quiet_since = time.monotonic()
        return found

    def _judge(self) -> None:
        """End the runs of dead workers; after the server was away, all get time to speak first."""
        now = time.monotonic()
        back = self._ledger.storage.last_trouble + BEATS_TO_COME_BACK * self._beat
        if now < max(back, self._judged + self._beat / 2):
            return
        self._judged = now
        self._ledger.end_stale()
        # A worker that died between taking a run and its first word left no heartbeat.
        silent = [q.number for q in self._open.values() if q.state == "running" and not q.worker]
        self._silent = {n: self._silent.get(n, now) for n in silent}
        grace = presence.BEATS * self._beat
        self._ledger.take_back([n for n, since in self._silent.items() if now - since > grace])

    def fetch(self, queued: Queued, runs_folder: Path) -> Outcome:
        """How a run has ended; its norms are put where those of runs here are.

        Args:
            queued: The run.
            runs_folder: The folder that holds the folders of all runs.
        """
        attributes = self._ledger.attributes(queued.number)
        file = runs_folder / queued.folder / RECORD
        parts = [attributes[key] for key in sorted(attributes) if key.startswith(NORMS)]
        if parts and not file.exists():
            parcels.unpack(parts, file)
        return Outcome(
            "unusable" if attributes.get("unusable") else "finished",
            reason=str(attributes.get("reason", "")),
            seconds=float(attributes.get("seconds", "nan")),
        )
