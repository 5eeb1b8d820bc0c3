"""Who works on a study: leases in it, renewed by a thread, told by the server's clock."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from normtune.errors import StudyError

if TYPE_CHECKING:
    from typing_extensions import Self

    from normtune.ledger import Ledger

CONTROLLER = "controller"
WORKER = "worker "  # and the number of its seat: attributes of a study can't be removed
BEATS = 3  # a lease holds for so many heartbeats
LAST_SECONDS = 2.0  # for a renewal that is under way
SETTLE_SECONDS = 0.3  # between taking a lease and looking whether another took it at the same time


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    Attributes:
        id: Tells this process from any other.
        host: Its machine.
        pid: Its process id there.
        place: What nobody else can hold on that machine at a time.
        until: When the lease is over, in seconds since 1970 by the server's clock.
    """

    id: str
    host: str
    pid: int
    place: str
    until: float

    def __str__(self) -> str:
        return f"{self.host} (process {self.pid})"


def holder_of(facts: Mapping[str, Any], key: str, now: float) -> Holder | None:
    """Who holds a lease now; None where nobody does."""
    plain = facts.get(key)
    holder = Holder(**plain) if plain else None
    return holder if holder is not None and holder.until > now else None


def workers(facts: Mapping[str, Any], now: float) -> list[Holder]:
    """The workers that live."""
    found = (holder_of(facts, key, now) for key in facts if key.startswith(WORKER))
    return [holder for holder in found if holder is not None]


class Lease:
    """Says in the study that this process lives, from `with` to its end.

    Args:
        ledger: The study, on a server.
        seconds: How often it is said.
        place: As for `Holder`.

    Attributes:
        id: Tells this process from any other.
        taken_by: Who took the lease while this process did not answer; None as it should be.
    """

    def __init__(self, ledger: Ledger, seconds: float, place: str = "") -> None:
        self.id = uuid.uuid4().hex
        self.taken_by: Holder | None = None
        self._ledger = ledger
        self._seconds = seconds
        self._place = place
        self._key = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> Self:
        self._key = self._free_key()
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(min(self._seconds, LAST_SECONDS))
        held = self._ledger.fact(self._key)
        if held and held["id"] == self.id:
            self._ledger.keep(self._key, None)

    def _free_key(self) -> str:
        raise NotImplementedError

    def _write(self) -> None:
        now = self._ledger.now()
        me = Holder(
            self.id, socket.gethostname(), os.getpid(), self._place, now + BEATS * self._seconds
        )
        self._ledger.keep(self._key, asdict(me))

    def _keep(self) -> None:
        while not self._over.wait(self._seconds):
            try:
                self._renew()
            except Exception:  # noqa: S112 - the next turn says it again, or the main thread fails
                continue

    def _renew(self) -> None:
        held = self._ledger.fact(self._key)
        if held and held["id"] != self.id:
            self._lost(Holder(**held))
        else:
            self._write()

    def _lost(self, holder: Holder) -> None:
        raise NotImplementedError


class ControllerLease(Lease):
    """There is one controller of a study at a time.

    Raises:
        StudyError: On entering, if another lives.
    """

    def _free_key(self) -> str:
        now = self._ledger.now()
        other = holder_of(self._ledger.facts(), CONTROLLER, now)
        # Who holds the lock file that a dead controller held is its heir at once.
        if other is not None and (other.host, other.place) != (socket.gethostname(), self._place):
            message = (
                f"another normtune search works on this study already: on {other}. End it there; "
                f"if that machine is gone, this one can begin in {max(other.until - now, 1):.0f} s"
            )
            raise StudyError(message)
        return CONTROLLER

    def __enter__(self) -> Self:
        super().__enter__()
        time.sleep(SETTLE_SECONDS)
        self._renew()
        try:
            self.check()
        except StudyError:
            self._over.set()
            raise
        return self

    def _lost(self, holder: Holder) -> None:
        self.taken_by = holder

    def check(self) -> None:
        """Refuse to go on where another took over.

        Raises:
            StudyError: If so.
        """
        if self.taken_by is not None:
            message = (
                f"another normtune search took this study over, on {self.taken_by}; what this one "
                "has done is kept there"
            )
            raise StudyError(message)


class Seat(Lease):
    """A worker's place among the workers of a study; whose seat is taken moves to a free one."""

    def _free_key(self) -> str:
        facts, now, number = self._ledger.facts(), self._ledger.now(), 0
        while holder_of(facts, f"{WORKER}{number}", now) is not None:
            number += 1
        return f"{WORKER}{number}"

    def _lost(self, holder: Holder) -> None:
        del holder
        self._key = self._free_key()
        self._write()
