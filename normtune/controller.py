"""The controller of a search: asks the planner, starts trainings, enters what comes back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from normtune import storages, stored
from normtune.assignments import (
    carried_out,
    outcome_words,
    pruner_for,
    refuse_changes,
    result_of,
    task_of,
    warmup_task,
    words,
)
from normtune.baseline import first_steps, load_record, settings_from
from normtune.crew import Crew, Look
from normtune.errors import StudyError, SuggestionError
from normtune.format import count
from normtune.ledger import INTERRUPTED, Ledger, Queued, Result
from normtune.plan import Plan, Planned, next_runs
from normtune.presence import ControllerLease
from normtune.proofs import check_seed, is_repeated, record_of, unclipped
from normtune.records import NormRecord
from normtune.results import SearchResult
from normtune.slots import Slots
from normtune.study import WARMUP_STEPS, Study
from normtune.suggestion import suggest
from normtune.tasks import RECORD, Outcome, Task
from normtune.trials import find

MOST_CRASHES = 3  # in a row
GENTLE_FACTOR = 0.1  # of the learning rate, for the warm-up of a training that dies unclipped
LAST_PATIENCE = 5.0  # seconds for the last words to a server


@dataclass(frozen=True)
class Progress:
    """What a search tells while it runs.

    Attributes:
        kind: suggestion, stage, workers, started, finished, copied, note, or output: what a
            training prints.
        text: The same in words.
        done: Trainings that have ended.
        total: Trainings that may be spent.
        running: Trainings under way.
        seconds_left: How long it will take at most, by the trainings so far; nan where unknown.
    """

    kind: Literal[
        "suggestion", "stage", "workers", "started", "finished", "copied", "note", "output"
    ]
    text: str
    done: int
    total: int
    running: int
    seconds_left: float = math.nan


Listener = Callable[[Progress], None]


class Controller:
    """Asks the planner, starts runs here or gives them to workers, and enters what comes back.

    Args:
        study: The study.
        tell: Is called with whatever happens.
        verbose: Whether that includes the lines that the trainings print.
        place: What no other controller on this machine holds at the same time.
    """

    def __init__(
        self, study: Study, tell: Listener, *, verbose: bool = False, place: str = ""
    ) -> None:
        search = study.config.search
        self._study = study
        self._tell = tell
        self._done, self._usual = 0, math.nan  # trainings so far, and seconds that one takes
        self._jobs = search.jobs
        show = self._show if verbose else None
        self._slots = Slots(search.jobs, search.time_limit, show)
        self._ledger = Ledger(study.storage, study.name, study.config.direction)
        self._crew: Crew | None = None
        self._lease: ControllerLease | None = None
        self._live: int | None = None  # workers, as they were told last
        if storages.is_server(study.storage):
            self._ledger.storage.tell = self._tell_of_storage
            self._ledger.storage.set_heartbeat(search.heartbeat)
            self._lease = ControllerLease(self._ledger, search.heartbeat, place)
        self._threads = 0
        self._crashes: list[str] = []
        self._stage = ""

    def run(self) -> SearchResult:
        """Run until the plan is done; whatever happens, no training is left running here."""
        with self._lease or nullcontext(), self._closing():
            self._open()
            self._start()
            while self._slots or self._crew_open:
                self._wait()
                self._start()
            result = self._result()
            self._ledger.keep("ended", result.why_ended)
        return result

    def _open(self) -> None:
        """Go on where an earlier controller stopped, and tell workers what they need to know."""
        search = self._study.config.search
        _begin_or_go_on(self._study, self._ledger)
        self._threads = self._fixed_threads()
        self._settle_running()
        settings = self._ledger.settings
        if settings is not None and settings.max_runs != search.max_runs:
            looked = bool(self._ledger.fact("verdict", {}).get("seeds"))
            raised = settings.raised + (looked and search.max_runs > settings.max_runs)
            self._ledger.settings = replace(settings, max_runs=search.max_runs, raised=raised)
        if self._lease is None:
            return
        self._ledger.take_back()
        self._crew = Crew(self._ledger, search.heartbeat)
        for queued in self._ledger.queued():
            record = self._study.runs_folder / queued.folder / RECORD
            if queued.state == "ended" and not record.exists():
                self._crew.fetch(queued, self._study.runs_folder)
        facts = {"path": str(self._study.path), "time limit": search.time_limit, "ended": ""}
        for key, fact in (facts | {"heartbeat": search.heartbeat}).items():
            self._ledger.keep(key, fact)
        self._look()

    @contextmanager
    def _closing(self) -> Iterator[None]:
        """End what runs here, and leave nothing to wait for workers."""
        try:
            yield
        except StudyError as error:
            if self._crew is not None and not self._taken_over:
                self._ledger.keep("ended", str(error))
            raise
        except KeyboardInterrupt:
            if self._crew is not None:
                self._ledger.storage.patience = LAST_PATIENCE
            raise
        finally:
            self._slots.end()
            if not self._taken_over:
                self._settle_running()
                if self._crew is not None:
                    self._ledger.take_back()

    @property
    def _taken_over(self) -> bool:
        return self._lease is not None and self._lease.taken_by is not None

    @property
    def _crew_open(self) -> int:
        return 0 if self._crew is None else self._crew.open

    def _fixed_threads(self) -> int:
        """Another number of threads gives other norms, so the first run decides."""
        kept = self._ledger.fact("threads")
        if not kept and not self._jobs:
            return 0  # the machine of the first worker says it
        threads = int(kept) if kept else self._study.threads(self._jobs)
        self._ledger.keep("threads", threads)
        return threads

    def _settle_running(self) -> None:
        """Enter runs that a controller left open: with their result, or to be run again."""
        for number, folder in self._ledger.running().items():
            outcome = Outcome.load(self._study.runs_folder / folder)
            if outcome is None or outcome.ending not in ("finished", "diverged", "pruned"):
                self._ledger.end(number, Result(INTERRUPTED))
            else:
                self._enter(number, folder, outcome)

    # --- waiting

    def _wait(self) -> None:
        """Wait until something has happened after which other runs may be planned."""
        happened = False
        while not happened:
            ended = self._slots.wait(None if self._crew is None else self._crew.pause)
            for number, task, outcome in ended:
                self._finish(number, task, outcome)
            happened = self._look() or bool(ended)

    def _look(self) -> bool:
        """Take in what workers have done; whether other runs may be planned now."""
        if self._crew is None:
            return False
        look = self._glance(self._crew)
        for queued in look.taken:
            planned = self._ledger.planned(queued.number)
            self._say("started", f"{words(planned)}: {planned.reason}; worker {queued.worker}")
        for queued in look.lost:
            run = words(self._ledger.planned(queued.number))
            who = f"worker {queued.worker} died or gave it back"
            self._say("note", f"{run}: {who.replace('  ', ' ')}; it is planned again")
        for queued in look.ended:
            self._arrived(queued)
        return look.calls_for_plan

    def _glance(self, crew: Crew) -> Look:
        """What workers have done."""
        if self._lease is not None:
            self._lease.check()
        look = crew.look()
        self._tell_of_workers(crew.live)
        return look

    def _tell_of_workers(self, live: int) -> None:
        if live == self._live or (not live and self._jobs):
            return
        self._live = live
        file, where = self._study.path.name, storages.masked(self._study.storage)
        hint = (
            f"no worker lives; on each machine: normtune worker {file}, with {storages.VARIABLE} "
            f"set to {where}"
        )
        self._say("workers", f"{count(live, 'worker')} at work" if live else hint)

    def _show(self, number: int, line: str) -> None:
        self._say("output", f"{number}| {line}")

    # --- starting

    def _start(self) -> None:
        """Start, copy and enqueue what may be now."""
        while self._slots.free > 0 or self._crew_room > 0:
            plan = self._plan()
            if not plan.runs:
                return
            self._note_stage(plan)
            self._begin(plan.runs[0])

    @property
    def _crew_room(self) -> int:
        return 0 if self._crew is None else self._crew.room(at_least=0 if self._jobs else 1)

    def _plan(self) -> Plan:
        settings = self._ledger.settings
        if settings is not None:
            return next_runs(settings, self._ledger.trials())
        seed = self._study.config.search.seed
        trials = self._ledger.trials()
        none = find((t for t in trials if t.state != "crashed"), (math.inf, 1.0), seed)
        if none is not None and none.ended:
            self._fix_settings()
            return self._plan()
        fraction = self._study.config.search.explore_fraction
        reason = "no clipping, to which all is compared"
        first = Planned(
            math.inf, 1.0, seed, "explore", free=False, reason=reason, fraction=fraction
        )
        return Plan(() if none else (first,), "explore", "the unclipped run comes first")

    def _begin(self, planned: Planned) -> None:
        if planned.free:
            source = unclipped(self._ledger, planned.seed, planned.lr_factor)
            if source is not None:
                self._ledger.copy(planned, source)
                self._say("copied", f"{words(planned)}: {planned.reason}")
                return
        if self._slots.free > 0 or self._crew is None:
            number, folder = self._ledger.begin(planned)
            self._slots.start(number, self._task(planned, folder))
            self._say("started", f"{words(planned)}: {planned.reason}")
        else:
            self._crew.enqueue(planned)

    def _task(self, planned: Planned, folder: str) -> Task:
        task = task_of(self._study, self._threads, planned, self._study.runs_folder / folder)
        return replace(task, pruner=pruner_for(self._study, self._ledger, planned))

    # --- finishing

    def _finish(self, number: int, task: Task, outcome: Outcome) -> None:
        self._enter(number, task.folder.name, outcome)
        self._judge(number, outcome)

    def _arrived(self, queued: Queued) -> None:
        """Take in what a worker has entered."""
        if self._crew is not None and queued.number in self._ledger.numbers():
            outcome = self._crew.fetch(queued, self._study.runs_folder)
            self._judge(queued.number, outcome, f"; worker {queued.worker}")

    def _judge(self, number: int, outcome: Outcome, where: str = "") -> None:
        """Tell how a run ended, and what follows from it."""
        trial = self._ledger.numbers()[number]
        said = outcome_words(trial.state, trial.value, outcome)
        self._say("finished", f"{words(trial)}: {said}{where}")
        if outcome.ending == "unusable":
            raise StudyError(outcome.reason)
        self._count_crashes(trial.state, f"{outcome.reason}{where}")
        if trial.state != "crashed":
            self._check_repeatable(number)
            check_seed(self._study, self._ledger, number)

    def _enter(self, number: int, folder: str, outcome: Outcome) -> None:
        max_norm = self._ledger.numbers()[number].max_norm
        path = self._study.runs_folder / folder
        self._ledger.end(number, result_of(self._study, outcome, path, max_norm))

    def _count_crashes(self, state: str, reason: str) -> None:
        if state != "crashed":
            self._crashes.clear()
            return
        self._crashes.append(reason)
        if len(self._crashes) >= MOST_CRASHES:
            message = (
                f"{MOST_CRASHES} trainings in a row crashed, the first with: {self._crashes[0]} "
                f"(their output is in {self._study.runs_folder})"
            )
            raise StudyError(message)

    def _check_repeatable(self, number: int) -> None:
        """Where runs of one seed do not repeat each other, none is copied from another."""
        settings = self._ledger.settings
        if settings is None or not settings.reuse or is_repeated(self._study, self._ledger, number):
            return
        self._ledger.settings = replace(settings, reuse=False)
        copies = [number for number, t in self._ledger.numbers().items() if t.free]
        self._ledger.withdraw(copies)
        n = len(copies)
        again = f"; {n} copied run{'s are' if n > 1 else ' is'} trained after all" if n else ""
        self._note(
            "two runs of one seed differ before the first clipped step, so the training is not "
            f"deterministic: no run is copied from another{again}"
        )

    # --- the suggestion

    def _fix_settings(self) -> None:
        """Suggest from the unclipped run's warm-up, and fix what the planner works with."""
        seed = self._study.config.search.seed
        source = unclipped(self._ledger, seed, 1.0)
        record = None if source is None else record_of(self._study, self._ledger, source)
        if source is None or record is None:
            message = f"the record of the unclipped run is gone from {self._study.runs_folder}"
            raise StudyError(message)
        warmup = first_steps(record, self._study.config.warmup_steps)
        try:
            suggestion = suggest(warmup, rule=self._study.config.rule)
        except SuggestionError as error:
            warmup = self._gentle_warmup(error)
            suggestion = suggest(warmup, rule=self._study.config.rule)
        finite = record.finite
        largest = float(finite.max()) if len(finite) else math.inf
        settings = settings_from(self._study.config, warmup, suggestion.max_norm, largest)
        if self._study.config.command is not None and not np.isfinite(record.lr).any():
            self._note(
                "the command steps without an optimizer whose learning rate is a number, so that "
                "rate cannot be scaled: no lower learning rate is tried"
            )
            settings = replace(settings, lr_runs=0)
        if len(warmup) == len(record):
            self._note_cut(self._ledger.attributes(source), len(record))
        self._ledger.settings = settings
        self._ledger.keep("suggestion", suggestion.to_dict())
        self._say("suggestion", str(suggestion))

    def _note_cut(self, attributes: Mapping[str, Any], steps: int) -> None:
        """A worker sends no more norms than a study can hold."""
        if "first steps" in attributes:
            self._note(
                f"the suggestion is read from the first {steps} norms of the unclipped run; its "
                f"whole record lies in {attributes['lies in']}"
            )

    def _gentle_warmup(self, why: SuggestionError) -> NormRecord:
        """A warm-up at a tenth of the learning rate, where the unclipped run left too few norms."""
        self._note(
            f"the unclipped run carries no suggestion ({why}); the norms are those of a warm-up at "
            f"{GENTLE_FACTOR:g} x the learning rate"
        )
        if self._crew is not None and not self._jobs:
            return self._warmed_up(self._crew)
        task = warmup_task(self._study, self._threads)
        return carried_out(replace(task, lr_factor=GENTLE_FACTOR))

    def _warmed_up(self, crew: Crew) -> NormRecord:
        """The record of the gentle warm-up, carried out by a worker."""
        seed, reason = self._study.config.search.seed, "norms at a lower rate"
        planned = Planned(math.inf, GENTLE_FACTOR, seed, "explore", free=False, reason=reason)
        steps = self._study.config.warmup_steps or WARMUP_STEPS
        queued: Queued | None = None
        while True:
            queued = queued or crew.enqueue(planned, steps=steps)
            time.sleep(crew.pause)
            look = self._glance(crew)
            if look.lost:
                queued = None
            for ended in look.ended:
                outcome = crew.fetch(ended, self._study.runs_folder)
                record = load_record(self._study.runs_folder / ended.folder)
                if record is None or outcome.ending == "unusable":
                    raise StudyError(outcome.reason)
                return record

    # --- telling

    def _note_stage(self, plan: Plan) -> None:
        if plan.stage != self._stage:
            self._stage = plan.stage
            self._say("stage", f"{plan.stage}: {plan.reason}")

    def _note(self, sentence: str) -> None:
        self._ledger.keep("notes", [*self._ledger.fact("notes", []), sentence])
        self._say("note", sentence)

    def _say(self, kind: Any, text: str) -> None:
        if kind != "output":  # many a line a second, between which no trial changes
            trials = self._ledger.trials()
            self._done = sum(t.ended and not t.free for t in trials)
            timed = [t.seconds / t.fraction for t in trials if t.seconds > 0 and not t.free]
            self._usual = sum(timed) / len(timed) if timed else math.nan
        self._tell(self._progress(kind, text))

    def _progress(self, kind: Any, text: str) -> Progress:
        total = self._study.config.search.max_runs
        under_way = sum(min(seconds, self._usual) for seconds in self._slots.seconds)
        at_a_time = max(1, self._jobs + (0 if self._crew is None else self._crew.live))
        left = ((total - self._done) * self._usual - under_way) / at_a_time
        running = len(self._slots) + self._crew_open
        return Progress(kind, text, self._done, total, running, max(left, 0.0))

    def _tell_of_storage(self, text: str) -> None:
        """Not `_say`, which asks the storage."""
        self._tell(self._progress("note", text))

    def _result(self) -> SearchResult:
        result = stored.result_from(self._study, self._ledger)
        self._ledger.keep("verdict", result.verdict.to_dict())
        return result


def _begin_or_go_on(study: Study, ledger: Ledger) -> None:
    """A study goes on only as it began; before its first result it may still be mended."""
    if ledger.fact("study") is not None and any(t.ended for t in ledger.trials()):
        way_out = (
            f"Undo that, or give another storage (or remove {storages.masked(study.storage)}) to "
            "begin anew"
        )
        refuse_changes(study, ledger.fact("study"), way_out=way_out)
    elif ledger.fact("study") != study.fingerprint():
        ledger.keep("study", study.fingerprint())
        ledger.withdraw(ledger.numbers())
