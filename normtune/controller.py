"""The controller of a search: asks the planner, starts trainings, enters what comes back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from normtune import processes
from normtune.baseline import (
    first_steps,
    load_record,
    norm_facts,
    same_until_clipped,
    settings_from,
)
from normtune.comparison import verdict
from normtune.errors import StudyError, SuggestionError
from normtune.format import duration
from normtune.ledger import INTERRUPTED, Ledger, Result, masked
from normtune.plan import Plan, Planned, next_runs
from normtune.processes import Child
from normtune.records import NormRecord
from normtune.results import SearchResult
from normtune.study import Study
from normtune.suggestion import suggest
from normtune.tasks import OUTPUT, RESULT, Outcome, Task, value_of
from normtune.trials import Trial, find, same, state_of

MOST_CRASHES = 3  # in a row
POLL_SECONDS = 0.2  # between looks at what running trainings print
GENTLE_FACTOR = 0.1  # of the learning rate, for the warm-up of a training that dies unclipped


@dataclass(frozen=True)
class Progress:
    """What a search tells while it runs.

    Attributes:
        kind: suggestion, stage, started, finished, copied, note, or output: what a training prints.
        text: The same in words.
        done: Trainings that have ended.
        total: Trainings that may be spent.
        running: Trainings under way.
        seconds_left: How long it will take at most, by the trainings so far; nan where unknown.
    """

    kind: Literal["suggestion", "stage", "started", "finished", "copied", "note", "output"]
    text: str
    done: int
    total: int
    running: int
    seconds_left: float = math.nan


Listener = Callable[[Progress], None]


class Controller:
    """Asks the planner, starts processes, and enters what comes back."""

    def __init__(self, study: Study, tell: Listener, *, verbose: bool = False) -> None:
        config = study.config
        self._study = study
        self._tell = tell
        self._verbose = verbose
        self._shown: dict[int, int] = {}  # bytes of each running training's output
        self._done, self._usual = 0, math.nan  # trainings so far, and seconds that one takes
        self._jobs = config.search.jobs
        self._ledger = Ledger(study.storage, study.name, config.direction)
        _refuse_changes(study, self._ledger)
        self._threads = self._fixed_threads()
        self._children: dict[int, Child] = {}
        self._crashes: list[str] = []
        self._stage = ""
        self._settle_running()
        settings = self._ledger.settings
        if settings is not None and settings.max_runs != config.search.max_runs:
            self._ledger.settings = replace(settings, max_runs=config.search.max_runs)

    def run(self) -> SearchResult:
        """Run until the plan is done; whatever happens, no training is left running."""
        try:
            while self._start() or self._children:
                for child in self._ended():
                    self._finish(child)
        finally:
            processes.end_all(list(self._children.values()))
            self._settle_running()
        return self._result()

    def _ended(self) -> list[Child]:
        """Wait until a training has ended, or has taken too long."""
        children = list(self._children.values())
        while True:
            ended = processes.first_to_end(children, self._patience())
            self._show_output()
            limit = self._study.config.search.time_limit or math.inf
            for child in children:
                if child not in ended and child.seconds >= limit:
                    child.give_up(f"took longer than the time limit of {duration(limit)}")
                    ended.append(child)
            if ended:
                return ended

    def _patience(self) -> float | None:
        """How long to wait before the next look; None waits for an end."""
        if self._verbose:
            return POLL_SECONDS
        limit = self._study.config.search.time_limit
        longest = max(child.seconds for child in self._children.values())
        return None if limit is None else max(0.0, limit - longest) + 0.01

    def _show_output(self) -> None:
        """Tell the whole lines that running trainings have printed since the last look."""
        for number, child in self._children.items() if self._verbose else ():
            with suppress(OSError), (child.task.folder / OUTPUT).open("rb") as file:
                file.seek(self._shown.get(number, 0))
                text, newline, _ = file.read().rpartition(b"\n")
                self._shown[number] = self._shown.get(number, 0) + len(text) + len(newline)
                for line in text.decode(errors="replace").splitlines():
                    self._say("output", f"{number}| {line}")

    def _fixed_threads(self) -> int:
        """Another number of threads gives other norms, so the first start decides."""
        kept = self._ledger.fact("threads")
        threads = int(kept) if kept else self._study.threads(self._jobs)
        self._ledger.keep("threads", threads)
        return threads

    def _settle_running(self) -> None:
        """Enter runs that a controller left open: with their result, or to be run again."""
        for number, folder in self._ledger.running().items():
            outcome = Outcome.load(self._study.runs_folder / folder)
            if outcome is None or outcome.ending not in ("finished", "diverged"):
                self._ledger.end(number, Result(INTERRUPTED))
            else:
                self._enter(number, folder, outcome)

    # --- starting

    def _start(self) -> bool:
        """Start what may start now; whether anything was started or copied."""
        any_started = False
        while len(self._children) < self._jobs:
            plan = self._plan()
            if not plan.runs:
                break
            self._note_stage(plan)
            self._begin(plan.runs[0])
            any_started = True
        return any_started

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
            source = self._unclipped(planned.seed, planned.lr_factor)
            if source is not None:
                self._ledger.copy(planned, source)
                self._say("copied", f"{_words(planned)}: {planned.reason}")
                return
        number, folder = self._ledger.begin(planned)
        self._children[number] = Child(self._task(planned, folder))
        self._say("started", f"{_words(planned)}: {planned.reason}")

    def _unclipped(self, seed: int, lr_factor: float) -> int | None:
        return next(
            (
                number
                for number, t in self._ledger.numbers().items()
                if math.isinf(t.max_norm)
                and t.seed == seed
                and same(t.lr_factor, lr_factor)
                and t.ended
            ),
            None,
        )

    def _task(self, planned: Planned, folder: str) -> Task:
        used = {child.task.slot for child in self._children.values()}
        slot = next(i for i in range(self._jobs) if i not in used)
        return replace(
            _task(self._study, self._threads, self._study.runs_folder / folder),
            seed=planned.seed,
            max_norm=planned.max_norm,
            lr_factor=planned.lr_factor,
            fraction=planned.fraction,
            slot=slot,
            slots=self._jobs,
        )

    # --- finishing

    def _finish(self, child: Child) -> None:
        number = next(n for n, c in self._children.items() if c is child)
        outcome = child.outcome()
        del self._children[number]
        state = self._enter(number, child.task.folder.name, outcome)
        trial = self._ledger.numbers()[number]
        self._say("finished", f"{_words(trial)}: {_outcome_words(trial, outcome)}")
        if outcome.ending == "unusable":
            raise StudyError(outcome.reason)
        self._count_crashes(state, outcome)
        if state != "crashed":
            self._check_repeatable(number, trial)
            self._check_seed(number, trial)

    def _enter(self, number: int, folder: str, outcome: Outcome) -> str:
        config = self._study.config
        value = None
        state: str = "crashed"
        if outcome.ending == "finished":
            value = value_of(outcome.values, config.search.value, config.direction)
            state = state_of(value, outcome.first_value, config.direction)
        elif outcome.ending == "diverged":
            state = "diverged"
        facts = {
            "seconds": outcome.seconds,
            "reason": outcome.reason,
            "first_value": outcome.first_value,
            "diverged": state == "diverged",
        }
        max_norm = self._ledger.numbers()[number].max_norm
        facts |= norm_facts(self._study.runs_folder / folder, max_norm)
        self._ledger.end(number, Result(state, value, outcome.values, facts))
        return state

    def _count_crashes(self, state: str, outcome: Outcome) -> None:
        if state != "crashed":
            self._crashes.clear()
            return
        self._crashes.append(outcome.reason)
        if len(self._crashes) >= MOST_CRASHES:
            message = (
                f"{MOST_CRASHES} trainings in a row crashed, the first with: {self._crashes[0]} "
                f"(their output is in {self._study.runs_folder})"
            )
            raise StudyError(message)

    def _check_repeatable(self, number: int, trial: Trial) -> None:
        """Until its first clipped step a run must repeat the unclipped run bit for bit."""
        settings = self._ledger.settings
        source = self._unclipped(trial.seed, trial.lr_factor)
        if settings is None or not settings.reuse or source in (None, number):
            return
        base, own = self._record(source), self._record(number)
        if base is None or own is None or same_until_clipped(base, own, trial.max_norm):
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

    def _check_seed(self, number: int, trial: Trial) -> None:
        """Two seeds of one arm must differ; one pair is proof enough."""
        if self._ledger.fact("seed matters"):
            return
        for other, known in self._ledger.numbers().items():
            alike = known.arm == trial.arm and known.fraction == trial.fraction
            if not alike or known.seed == trial.seed or known.free or not known.ended:
                continue
            a, b = self._record(number), self._record(other)
            if a is None or b is None:
                continue
            if known.value == trial.value and np.array_equal(a.norms, b.norms, equal_nan=True):
                seeds = f"seeds {known.seed} and {trial.seed}"
                raise StudyError(_ignored_seed(self._study, seeds))
            self._ledger.keep("seed matters", True)

    def _record(self, number: int | None) -> NormRecord | None:
        folder = self._ledger.folders().get(-1 if number is None else number, "")
        return load_record(self._study.runs_folder / folder)

    # --- the suggestion

    def _fix_settings(self) -> None:
        """Suggest from the unclipped run's warm-up, and fix what the planner works with."""
        seed = self._study.config.search.seed
        source = self._unclipped(seed, 1.0)
        record = self._record(source)
        if record is None:
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
        self._ledger.settings = settings
        self._ledger.keep("suggestion", suggestion.to_dict())
        self._say("suggestion", str(suggestion))

    def _gentle_warmup(self, why: SuggestionError) -> NormRecord:
        """A warm-up at a tenth of the learning rate, where the unclipped run left too few norms."""
        self._note(
            f"the unclipped run carries no suggestion ({why}); the norms are those of a warm-up at "
            f"{GENTLE_FACTOR:g} x the learning rate"
        )
        task = warmup_task(self._study, self._threads)
        return carried_out(replace(task, lr_factor=GENTLE_FACTOR))

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
        total = self._study.config.search.max_runs
        under_way = sum(min(child.seconds, self._usual) for child in self._children.values())
        left = ((total - self._done) * self._usual - under_way) / self._jobs
        self._tell(Progress(kind, text, self._done, total, len(self._children), max(left, 0.0)))

    def _result(self) -> SearchResult:
        settings, trials = self._ledger.settings, self._ledger.trials()
        if settings is None:
            message = "the unclipped run did not end, so there is nothing to compare with"
            raise StudyError(message)
        said = verdict(settings, trials)
        self._ledger.keep("verdict", said.to_dict())
        return SearchResult(
            name=self._study.name,
            storage=masked(self._study.storage),
            verdict=said,
            suggestion=self._ledger.fact("suggestion", {}),
            settings=settings,
            trials=trials,
            notes=tuple(self._ledger.fact("notes", [])),
            why_ended=next_runs(settings, trials).reason,
        )


# --- the study and its tasks ---


def _refuse_changes(study: Study, ledger: Ledger) -> None:
    """A study goes on only as it began; before its first result it may still be mended."""
    now = study.fingerprint()
    began: Mapping[str, Any] | None = ledger.fact("study")
    changed = [] if began is None else [k for k in {**began, **now} if began.get(k) != now.get(k)]
    if began is None or (changed and not any(t.ended for t in ledger.trials())):
        ledger.keep("study", now)
        ledger.withdraw(ledger.numbers())
    elif changed:
        changes = "; ".join(f"{k} was {_shown(began, k)}, now {_shown(now, k)}" for k in changed)
        message = (
            f"{study.path} changed since this study began: {changes}. Undo that, or give another "
            f"storage (or remove {masked(study.storage)}) to begin anew"
        )
        raise StudyError(message)


def _ignored_seed(study: Study, seeds: str) -> str:
    which = f"{seeds} gave the same norms and the same value"
    if study.config.command is None:
        hint = "draw initialization and batches from run.seed"
        return f"your train ignores run.seed: {which}; {hint}"
    if study.config.seed_inside:
        return (
            f"the command sets a seed of its own: {which}; give it {{seed}} by the flag that it "
            "has, as in --seed {seed}, or take its torch.manual_seed(...) out"
        )
    return f"the command ignores its {{seed}}: {which}; draw initialization and batches from it"


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if flat.get(key) is not None else "absent"


def _task(study: Study, threads: int, folder: Path) -> Task:
    config = study.config
    return Task(
        folder=folder,
        train=config.train or "",
        home=study.folder,
        command=config.command or (),
        seed_inside=config.seed_inside,
        metric=config.metric,
        metric_file=config.metric_file,
        seed=config.search.seed,
        params=config.params,
        threads=threads,
        device=config.device,
        metadata={"study": study.name},
    )


def warmup_task(study: Study, threads: int) -> Task:
    """The task that records the unclipped warm-up of a study and then stops by itself."""
    folder = study.runs_folder / "warmup"
    (folder / RESULT).unlink(missing_ok=True)
    return replace(_task(study, threads, folder), stop_after=study.config.warmup_steps)


def carried_out(task: Task) -> NormRecord:
    """The record of one task that needs no trial."""
    child = Child(task)
    try:
        processes.first_to_end([child])
    finally:
        processes.end_all([child])
    outcome = child.outcome()
    if outcome.ending in ("crashed", "unusable"):
        raise StudyError(outcome.reason)
    return NormRecord.load(task.record_path)


# --- words ---


def _words(run: Planned | Trial) -> str:
    clip = f"max_norm {run.max_norm:.3g}" if math.isfinite(run.max_norm) else "no clipping"
    rate = "" if run.lr_factor == 1.0 else f" at {run.lr_factor:.3g}x the rate"
    return f"{clip}{rate}, seed {run.seed}"


def _outcome_words(trial: Trial, outcome: Outcome) -> str:
    took = f" in {outcome.seconds:.1f} s" if math.isfinite(outcome.seconds) else ""
    if trial.value is not None:
        stuck = " (no better than its first report)" if trial.state == "stuck" else ""
        return f"{trial.value:.5g}{stuck}{took}"
    return f"{trial.state}{took}: {outcome.reason}"
