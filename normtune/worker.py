"""`work`: take the runs of a study that wait, and train them; no plan is made here."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from normtune import parcels, presence, processes, storages
from normtune.assignments import (
    outcome_words,
    pruner_for,
    refuse_changes,
    result_of,
    task_of,
    words,
)
from normtune.baseline import load_record
from normtune.errors import StudyError
from normtune.format import count
from normtune.ledger import NORMS, Ledger, Result, planned_of
from normtune.patience import NothingWaits
from normtune.presence import Seat
from normtune.slots import Slots
from normtune.study import Study, duration, load_study
from normtune.tasks import Outcome, Task

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

Tell = Callable[[str], None]

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between looks for a run that waits
SETTLE_SECONDS = 1.0  # a signal that ended the training may be for this process, too
LAST_PATIENCE = 5.0  # seconds for the last words to the storage
SICK = 2  # crashes in a row after which a worker leaves the runs to others


class _CrashedError(Exception):
    """Tells Optuna that a run has failed."""


def work(
    path: str | os.PathLike[str] | None = None,
    *,
    storage: str | None = None,
    name: str | None = None,
    wait: float | str | None = None,
    tell: Tell = print,
    verbose: bool = False,
) -> None:
    """Train the waiting runs of a study, one at a time, until it is done.

    Args:
        path: The study file; without it the one that the controller named, where it is here, too.
        storage: An Optuna storage URL on a server; the study file's or the environment's without.
        name: The name of the study, where no study file is given; needed where there are several.
        wait: How long to wait while there is nothing to train: seconds, or ``"30 min"``; None waits
            until the study is done.
        tell: Is called with what happens, line by line.
        verbose: Whether that includes the lines that the trainings print.

    Raises:
        StudyError: If the storage, the study or this machine cannot be used.
        KeyboardInterrupt: After Ctrl-C or SIGTERM; the run is given back.
    """
    seconds = duration(wait)
    asked = _asked(path, storage, name)
    storages.check_shared(asked.url, "normtune worker")
    found = _found(asked, _Patience(seconds), tell)
    with storages.explained(asked.url), storages.quiet(), _signals(found):
        study = _study_of(asked, found)
        refuse_changes(study, found.fact("study"), way_out=_SAME)
        if study.config.command is None:
            processes.warm_up()
        _Worker(study, found, _Patience(seconds), tell, verbose=verbose).run()


_SAME = "A worker trains what the study began with: give it the same files as the controller has"


@dataclass(frozen=True)
class _Asked:
    """What a worker was asked to do."""

    url: str
    file: Path | None
    name: str | None


def _asked(path: str | os.PathLike[str] | None, storage: str | None, name: str | None) -> _Asked:
    if path is not None and name is not None:
        message = f"give a study file or --study, but not both: got {path} and {name}"
        raise ValueError(message)
    if path is not None:
        study = load_study(path)
        return _Asked(storage or study.storage, study.path, study.name)
    url = storages.chosen(storage)
    if url is None:
        message = (
            f"a worker needs the storage of the study: set {storages.VARIABLE}={storages.EXAMPLE}, "
            "or give --storage"
        )
        raise ValueError(message)
    return _Asked(url, None, name)


class _Patience:
    """Counts how long there was nothing to do."""

    def __init__(self, seconds: object) -> None:
        self._seconds = seconds if isinstance(seconds, float) else None
        self._since = time.monotonic()

    def begin(self) -> None:
        self._since = time.monotonic()

    @property
    def over(self) -> bool:
        return self._seconds is not None and time.monotonic() - self._since >= self._seconds

    def pause(self) -> None:
        """Wait a little: the longer, the longer there was nothing, and never all at once."""
        waited = time.monotonic() - self._since
        pause = min(FIRST_PAUSE + 0.05 * waited, LONGEST_PAUSE)
        time.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311 - no secret


# --- which study ---


def _found(asked: _Asked, patience: _Patience, tell: Tell) -> Ledger:
    """The study, once a controller has begun it."""
    told = False
    while True:
        ledger = _begun(asked)
        if ledger is not None:
            return ledger
        what = f"study {asked.name}" if asked.name else "a study"
        if patience.over:
            message = f"no normtune search has begun {what} in {storages.masked(asked.url)}"
            raise StudyError(message)
        if not told:
            tell(f"waiting for normtune search to begin {what}")
            told = True
        patience.pause()


def _begun(asked: _Asked) -> Ledger | None:
    names = storages.studies_in(asked.url)
    if asked.name is None and len(names) > 1:
        message = (
            f"{storages.masked(asked.url)} holds {len(names)} studies: {', '.join(sorted(names))}; "
            "say which by --study NAME, or give the study file"
        )
        raise StudyError(message)
    name = asked.name or (names[0] if names else None)
    if name not in names or name is None:
        return None
    ledger = Ledger(asked.url, name)
    beat = ledger.fact("heartbeat")
    if beat is None:  # the controller has just made it
        ledger.close()
        return None
    ledger.storage.takes = True
    ledger.storage.set_heartbeat(int(beat))
    return ledger


def _study_of(asked: _Asked, ledger: Ledger) -> Study:
    file = asked.file or Path(ledger.fact("path"))
    if not file.is_file():
        message = (
            f"the study began from {file}, which is not on this machine; give its file here: "
            f"normtune worker {file.name}"
        )
        raise StudyError(message)
    return load_study(file)


@contextmanager
def _signals(ledger: Ledger) -> Iterator[None]:
    """SIGTERM is Ctrl-C; after either, the storage gets a few seconds for the last words."""

    def leave(number: int, _: FrameType | None) -> None:
        ledger.storage.patience = LAST_PATIENCE
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, signal.SIG_IGN)
        del number
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- the work ---


class _Worker:
    """Takes what waits."""

    def __init__(
        self, study: Study, ledger: Ledger, patience: _Patience, tell: Tell, *, verbose: bool
    ) -> None:
        self._study = study
        self._ledger = ledger
        self._patience = patience
        self._tell = tell
        self._show = (lambda number, line: tell(f"{number}| {line}")) if verbose else None
        self._beat = float(ledger.fact("heartbeat"))
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._facts: dict[str, Any] = {}  # of the study, as they were last
        self._trial_id: int | None = None
        self._n = 0  # runs whose end was entered
        self._crashes: list[str] = []
        ledger.storage.tell = tell

    def run(self) -> None:
        """Train run by run, until the study is done."""
        with Seat(self._ledger, self._beat) as seat:
            self._tell(f"worker {self._name} of study {self._study.name}: takes the runs that wait")
            while not self._done():
                if not self._take():
                    if self._patience.over:
                        self._tell("nothing to train for as long as --wait says; this worker ends")
                        return
                    self._patience.pause()
                    continue
                self._patience.begin()
                self._leave_if_sick(seat)

    def _done(self) -> bool:
        self._facts = self._ledger.facts()
        ended = self._facts.get("ended")
        if ended:
            self._tell(f"the study has ended after {count(self._n, 'run')} here: {ended}")
        return bool(ended)

    def _take(self) -> bool:
        """Train one run; whether there was one."""
        if not self._ledger.waiting():
            return False
        refuse_changes(load_study(self._study.path), self._facts["study"], way_out=_SAME)
        self._trial_id = None
        try:
            self._ledger.study.optimize(self._train, n_trials=1, catch=(_CrashedError,))
        except NothingWaits:
            return False
        except (ValueError, AssertionError):
            if not self._is_lost():
                raise
        return True

    def _is_lost(self) -> bool:
        """Whether the run was ended by the controller, which took this worker for dead."""
        if self._trial_id is None:
            return False
        return bool(self._ledger.storage.get_trial(self._trial_id).state.is_finished())

    def _train(self, trial: optuna.Trial) -> float:
        """The objective of Optuna's optimize."""
        from optuna.exceptions import UpdateFinishedTrialError

        self._trial_id = trial._trial_id
        self._ledger.storage.record_heartbeat(trial._trial_id)  # before anything that may fail
        frozen = self._ledger.storage.get_trial(trial._trial_id)
        task = self._task(frozen)
        try:
            trial.set_user_attr("worker", self._name)
            self._tell(f"started: {words(planned_of(frozen))} (trial {trial.number})")
            outcome = self._carried_out(trial.number, task)
            return self._delivered(trial, task, outcome)
        except UpdateFinishedTrialError:
            self._tell(
                f"trial {trial.number} was given to another worker, since this one was silent for "
                f"over {presence.BEATS * self._beat:g} s; what it has stays in {task.folder}"
            )
            raise

    def _task(self, frozen: FrozenTrial) -> Task:
        planned, facts = planned_of(frozen), frozen.user_attrs
        folder = self._study.runs_folder / str(facts["folder"])
        task = task_of(self._study, self._threads(), planned, folder)
        steps = facts.get("warm-up")
        if steps is not None:
            return replace(task, stop_after=int(steps))
        return replace(task, pruner=pruner_for(self._study, self._ledger, planned))

    def _threads(self) -> int:
        """Another number of threads gives other norms, so the first run decides."""
        kept = self._facts.get("threads")
        if not kept:
            kept = self._study.threads(1)
            self._ledger.keep("threads", kept)
        return int(kept)

    def _carried_out(self, number: int, task: Task) -> Outcome:
        slots = Slots(1, self._facts.get("time limit"), self._show)
        try:
            slots.start(number, task)
            ((_, _, outcome),) = slots.wait()
            if outcome.ending == "crashed":
                time.sleep(SETTLE_SECONDS)
        finally:
            slots.end()
        return outcome

    def _delivered(self, trial: optuna.Trial, task: Task, outcome: Outcome) -> float:
        """Enter all that the controller needs of a run."""
        import optuna

        self._send_norms(trial, task)
        if task.stop_after is not None:
            trial.set_user_attr("reason", outcome.reason)
            trial.set_user_attr("unusable", outcome.ending in ("crashed", "unusable"))
            raise optuna.TrialPruned
        result = result_of(self._study, outcome, task.folder, task.max_norm)
        self._ledger.write(trial, result)
        said = outcome_words(result.state, result.value, outcome)
        self._tell(f"finished: {words(task)}: {said}")
        self._n += 1
        return self._told(result)

    def _told(self, result: Result) -> float:
        import optuna

        state, value = self._ledger.told(result)
        if state == optuna.trial.TrialState.FAIL:
            self._crashes.append(str((result.facts or {}).get("reason", "")))
            raise _CrashedError
        self._crashes.clear()
        if state == optuna.trial.TrialState.PRUNED or value is None:
            raise optuna.TrialPruned
        return value

    def _send_norms(self, trial: optuna.Trial, task: Task) -> None:
        record = load_record(task.folder)
        if record is None:
            return
        wanted = parcels.last_step(record, task.max_norm)
        parts, until = parcels.pack(task.record_path, wanted)
        for i, part in enumerate(parts):
            trial.set_user_attr(f"{NORMS}{i:02}", part)
        trial.set_user_attr("lies in", f"{socket.gethostname()}:{task.folder}")
        if until != wanted:
            trial.set_user_attr("first steps", until)

    def _leave_if_sick(self, seat: Seat) -> None:
        """A machine on which all crashes must not end the study of machines on which none does."""
        others = [w for w in self._others() if w.id != seat.id] if self._crashes else []
        if not others:
            return
        if len(self._crashes) >= SICK:
            message = (
                f"{SICK} trainings in a row crashed on this machine, the last with: "
                f"{self._crashes[-1]}; the other workers ({len(others)}) go on without it"
            )
            raise StudyError(message)
        self._tell(f"a crash: other workers go first for {self._beat:g} s")
        time.sleep(self._beat)

    def _others(self) -> list[presence.Holder]:
        return presence.workers(self._ledger.facts(), self._ledger.now())
