"""A storage on a server that may be away for a while: what is asked waits until it is back."""

from __future__ import annotations

import itertools
import math
import random
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timezone
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import optuna
import sqlalchemy
from optuna.storages import BaseStorage
from optuna.storages._heartbeat import BaseHeartbeat

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial, TrialState

P = ParamSpec("P")
T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds between attempts; the latter less than a heartbeat
BEATS_OF_GRACE = 3  # a run whose worker was silent for so many heartbeats is given to another


class NothingWaits(Exception):  # noqa: N818 - it is no error
    """No run waits for a worker."""


def _asking(name: str) -> Callable[..., Any]:
    def ask(self: Patient, *args: Any, **kwargs: Any) -> Any:
        return self.insist(getattr(self._inner, name), *args, **kwargs)

    ask.__name__ = name
    return ask


_OF_OPTUNA = [
    name
    for kind in (BaseStorage, BaseHeartbeat)
    for name, value in vars(kind).items()
    if callable(value) and (not name.startswith("_") or name == "_get_stale_trial_ids")
]
_Asking: Any = type("_Asking", (BaseStorage, BaseHeartbeat), {n: _asking(n) for n in _OF_OPTUNA})


class Patient(_Asking):  # type: ignore[misc]
    """Optuna's storage, asked again and again while its server does not answer.

    Args:
        storage: The storage itself.
        explain: What a driver's error says, in words without a password.

    Attributes:
        tell: Is called when the server stops to answer, and when it is back.
        patience: How many seconds to ask on; then the last error is raised.
        takes: Whether this process only takes runs that wait, and neither makes trials nor judges
            which others are dead.
        last_trouble: When the server did not answer last, by `time.monotonic`.
        close: Gives the connections back; it is called when nobody holds the storage any more.
    """

    def __init__(self, storage: RDBStorage, explain: Callable[[BaseException], str]) -> None:
        self._rdb = storage
        self._inner: Any = optuna.storages.get_storage(
            storage
        )  # with Optuna's cache of ended trials
        self._explain = explain
        self._away = False
        self.tell: Callable[[str], None] = lambda _: None
        self.patience = math.inf
        self.takes = False
        self.last_trouble = time.monotonic()
        self.close = weakref.finalize(self, storage.engine.dispose)

    def set_heartbeat(self, seconds: int) -> None:
        """How often a worker's run says that it lives."""
        self._rdb.heartbeat_interval = seconds
        self._rdb.grace_period = BEATS_OF_GRACE * seconds

    def now(self) -> float:
        """The server's clock, in seconds since 1970."""
        return self.insist(self._clock)

    def record_heartbeat(self, trial_id: int) -> None:
        """Say that a run lives; a beat that does not get through is left to the next one."""
        try:
            self._inner.record_heartbeat(trial_id)
        except Exception as error:
            if not _is_absence(error):
                raise
            self._is_away(error)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Make a trial, unless this process only takes what waits.

        Raises:
            NothingWaits: If it does: another was faster.
        """
        if self.takes:
            raise NothingWaits
        return int(self.insist(self._inner.create_new_trial, study_id, template_trial))

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Begin or end a trial; whether it could be begun."""
        attempts = itertools.count()

        def attempt() -> bool:
            again = next(attempts) > 0
            try:
                return bool(self._inner.set_trial_state_values(trial_id, state, values))
            except optuna.exceptions.UpdateFinishedTrialError:
                # The first attempt may have been carried out, and only its answer was lost.
                if again and self._stands(trial_id, state, values):
                    return True
                raise

        return self.insist(attempt)

    def _stands(self, trial_id: int, state: TrialState, values: Sequence[float] | None) -> bool:
        trial = self._inner.get_trial(trial_id)
        return bool(trial.state == state and (values is None or trial.values == list(values)))

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        return [] if self.takes else self.insist(self._inner._get_stale_trial_ids, study_id)

    def insist(self, ask: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What the storage answers, once it does.

        Args:
            ask: Asks it.
            args: For `ask`.
            kwargs: For `ask`.
        """
        started, pause = time.monotonic(), FIRST_PAUSE
        while True:
            try:
                answer = ask(*args, **kwargs)
            except Exception as error:
                if not _is_absence(error) or time.monotonic() - started >= self.patience:
                    raise
                self._is_away(error)
            else:
                self._is_back()
                return answer
            time.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311 - no secret
            pause = min(2 * pause, LONGEST_PAUSE)

    def _is_away(self, error: BaseException) -> None:
        self.last_trouble = time.monotonic()
        if not self._away:
            self._away = True
            reason = self._explain(error)
            self.tell(f"the storage does not answer; trainings go on, and it is asked on: {reason}")

    def _is_back(self) -> None:
        if self._away:
            self._away = False
            self.tell("the storage answers again")

    def _clock(self) -> float:
        with self._rdb.engine.connect() as connection:
            now = connection.execute(sqlalchemy.select(sqlalchemy.func.now())).scalar_one()
        return float(now.replace(tzinfo=now.tzinfo or timezone.utc).timestamp())


def _is_absence(error: BaseException | None) -> bool:
    """Whether an error says that the server is away, and not that it was asked something wrong."""
    exc = sqlalchemy.exc
    # The last of them: what Optuna asks next within the transaction that was torn.
    absent = (exc.OperationalError, exc.InterfaceError, exc.PendingRollbackError)
    while error is not None:
        if isinstance(error, absent) or getattr(error, "connection_invalidated", False):
            return True
        error = error.__cause__
    return False
