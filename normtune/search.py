"""`record_study` and `search`: the controller that runs a study's trainings."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from normtune import processes, statistics
from normtune.comparison import verdict
from normtune.doubts import is_adaptive
from normtune.errors import RecordError, StudyError, SuggestionError
from normtune.ledger import INTERRUPTED, Ledger, Result, exists, masked
from normtune.plan import Plan, Planned, describe_plan, next_runs
from normtune.processes import Child
from normtune.records import SUFFIX, NormRecord
from normtune.results import SearchResult
from normtune.study import Study, load_study
from normtune.suggestion import Suggestion, suggest
from normtune.tasks import RECORD, Outcome, Task, value_of
from normtune.trials import Settings, Trial, find, same, state_of

MOST_CRASHES = 3  # in a row
GENTLE_FACTOR = 0.1  # of the learning rate, for the warm-up of a training that dies unclipped
# The range of the search (DESIGN 4): acceptable values of all tasks tried lay within it.
BELOW_MEDIAN, BELOW_SMALLEST, BELOW_SMALLEST_ADAPTIVE, ABOVE_MEDIAN = 100.0, 30.0, 4.0, 10.0


@dataclass(frozen=True)
class Progress:
    """What a search tells while it runs.

    Attributes:
        kind: suggestion, stage, started, finished, copied or note.
        text: The same in words.
        done: Trainings that have ended.
        total: Trainings that may be spent.
        running: Trainings under way.
    """

    kind: Literal["suggestion", "stage", "started", "finished", "copied", "note"]
    text: str
    done: int
    total: int
    running: int


Listener = Callable[[Progress], None]


@dataclass(frozen=True)
class Recorded:
    """The warm-up of a study.

    Attributes:
        path: The record file.
        record: The norms in it.
        suggestion: The max_norm suggested from them.
    """

    path: Path
    record: NormRecord
    suggestion: Suggestion


def record_study(path: str | os.PathLike[str]) -> Recorded:
    """Run the unclipped warm-up of a study, stop it by itself, and suggest a max_norm.

    Args:
        path: The study file. The record is written beside it, as ``<name>.norms.jsonl``.

    Raises:
        StudyError: If the study file or the training is at fault.
        SuggestionError: If the recorded norms cannot carry a suggestion.
    """
    study = _load(path)
    with _locked(study):
        file = study.folder / f"{study.name}{SUFFIX}"
        task = replace(_warmup_task(study, study.threads(1)), record=file)
        record = _carried_out(task)
    return Recorded(file, record, suggest(record, rule=study.config.rule))


def search(
    path: str | os.PathLike[str],
    *,
    max_runs: int | None = None,
    jobs: int | None = None,
    storage: str | None = None,
    progress: Listener | None = None,
) -> SearchResult:
    """Run a study until its questions are decided or its budget is spent; a second call goes on.

    Args:
        path: The study file.
        max_runs: The budget, instead of the file's.
        jobs: How many trainings run at a time, instead of the file's.
        storage: An Optuna storage URL, instead of the file's.
        progress: Is called with a `Progress` whenever something happens.

    Raises:
        StudyError: If the study file or the training is at fault, if the study changed since it
            began, or if three trainings in a row crashed.
        KeyboardInterrupt: After Ctrl-C; what is done is kept, and no training is left running.
    """
    study = _overridden(_load(path), max_runs=max_runs, jobs=jobs, storage=storage)
    with _locked(study):
        processes.warm_up()
        controller = _Controller(study, progress or (lambda _: None))
        return controller.run()


def plan_of(
    path: str | os.PathLike[str], *, max_runs: int | None = None, storage: str | None = None
) -> str:
    """What a search would run, how long it would take, and which sentences it can reach.

    Args:
        path: The study file.
        max_runs: The budget, instead of the file's.
        storage: An Optuna storage URL, instead of the file's.
    """
    study = _overridden(_load(path), max_runs=max_runs, jobs=None, storage=storage)
    config = study.config.search
    # The split does not depend on the norms, so any will do before they are recorded.
    settings = _settings(study, NormRecord.of(np.linspace(0.5, 1.5, 30)), 1.0)
    trials: tuple[Trial, ...] = ()
    if exists(study.storage, study.name):
        ledger = Ledger(study.storage, study.name, study.config.direction)
        trials = ledger.trials()
        settings = replace(ledger.settings or settings, max_runs=config.max_runs)
    return describe_plan(settings, trials, jobs=config.jobs)


# --- the controller ----------------------------------------------------------------------------


class _Controller:
    """Asks the planner, starts processes, and enters what comes back."""

    def __init__(self, study: Study, tell: Listener) -> None:
        config = study.config
        self._study = study
        self._tell = tell
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
        try:
            while self._start() or self._children:
                for child in processes.first_to_end(list(self._children.values())):
                    self._finish(child)
        finally:
            processes.end_all(list(self._children.values()))
            self._settle_running()
        return self._result()

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
        facts |= _norm_facts(self._study.runs_folder / folder, max_norm)
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
        if base is None or own is None or _same_until_clipped(base, own, trial.max_norm):
            return
        self._ledger.settings = replace(settings, reuse=False)
        n = self._ledger.withdraw_copies()
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
                message = (
                    f"your train ignores run.seed: seeds {known.seed} and {trial.seed} gave the "
                    "same norms and the same value; draw initialization and batches from run.seed"
                )
                raise StudyError(message)
            self._ledger.keep("seed matters", True)

    def _record(self, number: int | None) -> NormRecord | None:
        folder = self._ledger.folders().get(-1 if number is None else number, "")
        return _load_record(self._study.runs_folder / folder)

    # --- the suggestion

    def _fix_settings(self) -> None:
        """Suggest from the unclipped run's warm-up, and fix what the planner works with."""
        seed = self._study.config.search.seed
        source = self._unclipped(seed, 1.0)
        record = self._record(source)
        if record is None:
            message = f"the record of the unclipped run is gone from {self._study.runs_folder}"
            raise StudyError(message)
        warmup = _first(record, self._study.config.warmup_steps)
        try:
            suggestion = suggest(warmup, rule=self._study.config.rule)
        except SuggestionError as error:
            warmup = self._gentle_warmup(error)
            suggestion = suggest(warmup, rule=self._study.config.rule)
        finite = record.finite
        largest = float(finite.max()) if len(finite) else math.inf
        self._ledger.settings = _settings(self._study, warmup, suggestion.max_norm, largest)
        self._ledger.keep("suggestion", suggestion.to_dict())
        self._say("suggestion", str(suggestion))

    def _gentle_warmup(self, why: SuggestionError) -> NormRecord:
        """A warm-up at a tenth of the learning rate, where the unclipped run left too few norms."""
        self._note(
            f"the unclipped run carries no suggestion ({why}); the norms are those of a warm-up at "
            f"{GENTLE_FACTOR:g} x the learning rate"
        )
        task = _warmup_task(self._study, self._threads)
        return _carried_out(replace(task, lr_factor=GENTLE_FACTOR))

    # --- telling

    def _note_stage(self, plan: Plan) -> None:
        if plan.stage != self._stage:
            self._stage = plan.stage
            self._say("stage", f"{plan.stage}: {plan.reason}")

    def _note(self, sentence: str) -> None:
        self._ledger.keep("notes", [*self._ledger.fact("notes", []), sentence])
        self._say("note", sentence)

    def _say(self, kind: Any, text: str) -> None:
        trials = self._ledger.trials()
        done = sum(t.ended and not t.free for t in trials)
        total = self._study.config.search.max_runs
        self._tell(Progress(kind, text, done, total, len(self._children)))

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


# --- the study ---------------------------------------------------------------------------------


def _load(path: str | os.PathLike[str]) -> Study:
    study = load_study(path)
    if study.config.train is None:
        message = f"{path}: command: is not run yet; give train: file.py:function"
        raise StudyError(message)
    return study


def _overridden(
    study: Study, *, max_runs: int | None, jobs: int | None, storage: str | None
) -> Study:
    given = {"max_runs": max_runs, "jobs": jobs, "storage": storage}
    for name, least in (("max_runs", 4), ("jobs", 1)):
        value = given[name]
        if isinstance(value, int) and value < least:
            message = f"{name} must be at least {least} but got {value}"
            raise ValueError(message)
    asked = {key: value for key, value in given.items() if value is not None}
    config = study.config.search.model_copy(update=asked)
    return replace(study, config=study.config.model_copy(update={"search": config}))


@contextlib.contextmanager
def _locked(study: Study) -> Iterator[None]:
    """One controller at a time: two would run everything twice."""
    import fcntl

    try:
        study.runs_folder.mkdir(parents=True, exist_ok=True)
        file = (study.runs_folder / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        message = f"cannot write to {study.runs_folder}: {error.strerror}"
        raise StudyError(message) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            message = f"another normtune works on this study already: {study.path}"
            raise StudyError(message) from None
        yield


def _refuse_changes(study: Study, ledger: Ledger) -> None:
    """A study goes on only as it began."""
    now = study.fingerprint()
    began: Mapping[str, Any] | None = ledger.fact("study")
    if began is None:
        ledger.keep("study", now)
        return
    keys = [key for key in {**began, **now} if began.get(key) != now.get(key)]
    if keys:
        changes = "; ".join(f"{k} was {_shown(began, k)}, now {_shown(now, k)}" for k in keys)
        message = (
            f"{study.path} changed since this study began: {changes}. Undo that, or give another "
            f"storage: (or remove {masked(study.storage)}) to begin anew"
        )
        raise StudyError(message)


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if flat.get(key) is not None else "absent"


def _task(study: Study, threads: int, folder: Path) -> Task:
    config = study.config
    return Task(
        folder=folder,
        train=str(config.train),
        home=study.folder,
        seed=config.search.seed,
        params=config.params,
        threads=threads,
        device=config.device,
        metadata={"study": study.name},
    )


def _warmup_task(study: Study, threads: int) -> Task:
    folder = study.runs_folder / "warmup"
    (folder / "result.json").unlink(missing_ok=True)
    return replace(_task(study, threads, folder), stop_after=study.config.warmup_steps)


def _carried_out(task: Task) -> NormRecord:
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


def _settings(
    study: Study, warmup: NormRecord, suggestion: float, largest: float = math.inf
) -> Settings:
    """What the planner works with, from the norms of an unclipped warm-up."""
    config = study.config.search
    positive = warmup.finite[warmup.finite > 0]
    optimizer = str(warmup.metadata.get("optimizer", ""))
    low, high = search_range(positive, largest=largest, adaptive=is_adaptive(optimizer))
    rates = warmup.lr[np.isfinite(warmup.lr)]
    return Settings(
        max_runs=config.max_runs,
        lr_runs=config.lr_runs,
        margin=config.margin,
        direction=study.config.direction,
        seed=config.seed,
        suggestion=suggestion,
        current=warmup.current,
        low=low,
        high=high,
        adaptive=is_adaptive(optimizer),
        half_precision=str(warmup.metadata.get("dtype")) in ("float16", "bfloat16"),
        explore_fraction=config.explore_fraction,
        lr=float(rates.max()) if len(rates) else None,
    )


def search_range(norms: Any, *, largest: float, adaptive: bool) -> tuple[float, float]:
    """Where a max_norm is searched: the smallest and the largest value.

    Args:
        norms: Positive unclipped norms of the warm-up.
        largest: The largest finite norm of the whole unclipped run.
        adaptive: Whether the optimizer is Adam-like.

    >>> search_range([1.0, 2.0, 3.0], largest=50.0, adaptive=False)
    (0.02, 20.0)
    """
    median, smallest = float(np.median(norms)), float(np.min(norms))
    below = BELOW_SMALLEST_ADAPTIVE if adaptive else BELOW_SMALLEST
    low = min(median / BELOW_MEDIAN, smallest / below)
    return low, max(min(largest, ABOVE_MEDIAN * median), median)


# --- records and words -------------------------------------------------------------------------


def _load_record(folder: Path) -> NormRecord | None:
    try:
        return NormRecord.load(folder / RECORD)
    except RecordError:
        return None


def _norm_facts(folder: Path, max_norm: float) -> dict[str, float]:
    record = _load_record(folder)
    if record is None or not len(record.finite):
        return {}
    norms = record.norms[~record.skipped]
    finite = record.finite
    effect = statistics.clip_effect(finite, max_norm) if math.isfinite(max_norm) else None
    return {
        "largest_norm": float(finite.max()) if np.isfinite(norms).all() else math.inf,
        "smallest_norm": float(finite.min()),
        "clip_share": effect.share if effect else 0.0,
        "kept": effect.kept if effect else 1.0,
    }


def _same_until_clipped(base: NormRecord, own: NormRecord, max_norm: float) -> bool:
    """Whether the norms agree bit for bit up to the first step that was clipped."""
    n = min(len(base), len(own))
    clipped = np.flatnonzero(~(statistics.coefficients(own.norms[:n], max_norm) >= 1))
    end = int(clipped[0]) + 1 if len(clipped) else n
    return np.array_equal(base.norms[:end], own.norms[:end], equal_nan=True)


def _first(record: NormRecord, n: int) -> NormRecord:
    """The first `n` steps of a record."""
    arrays = ("steps", "norms", "max_norm", "lr", "skipped", "belted")
    groups = {name: values[:n] for name, values in record.groups.items()}
    cut = {name: getattr(record, name)[:n] for name in arrays}
    return dataclasses.replace(record, groups=groups, **cut)


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
