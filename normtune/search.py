"""`record_study`, `search` and `plan_of`: what `normtune` does with a study file."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from normtune import processes
from normtune.assignments import carried_out, warmup_task
from normtune.baseline import settings_from
from normtune.controller import Controller, Listener, Progress
from normtune.errors import StudyError
from normtune.ledger import Ledger
from normtune.plan import describe_plan
from normtune.records import SUFFIX, NormRecord
from normtune.results import SearchResult
from normtune.storages import check_shared, exists, explained, quiet
from normtune.study import Study, duration, load_study
from normtune.suggestion import Suggestion, suggest
from normtune.trials import Trial

__all__ = ["Progress", "Recorded", "SearchResult", "plan_of", "record_study", "search"]


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


def record_study(
    path: str | os.PathLike[str], *, output: str | os.PathLike[str] | None = None
) -> Recorded:
    """Run the unclipped warm-up of a study, stop it by itself, and suggest a max_norm.

    Args:
        path: The study file.
        output: The record file; ``<name>.norms.jsonl`` beside the study file without it.

    Returns:
        The record, its file and the suggestion.

    Raises:
        StudyError: If the study file or the training is at fault.
        SuggestionError: If the recorded norms cannot carry a suggestion.
    """
    study = load_study(path)
    with _locked(study):
        file = Path(output) if output else study.folder / f"{study.name}{SUFFIX}"
        task = replace(warmup_task(study, study.threads(1)), record=file)
        record = carried_out(task)
    return Recorded(file, record, suggest(record, rule=study.config.rule))


def search(
    path: str | os.PathLike[str],
    *,
    max_runs: int | None = None,
    jobs: int | None = None,
    storage: str | None = None,
    time_limit: float | str | None = None,
    progress: Listener | None = None,
    verbose: bool = False,
) -> SearchResult:
    """Run a study until its questions are decided or its budget is spent; a second call goes on.

    Args:
        path: The study file.
        max_runs: The budget, instead of the file's.
        jobs: How many trainings run at a time on this machine, instead of the file's; 0 leaves
            them all to workers.
        storage: An Optuna storage URL, instead of the file's or the environment's.
        time_limit: How long a training may take, instead of the file's: seconds, or ``"30 min"``.
        progress: Is called with a `Progress` whenever something happens.
        verbose: Whether that includes the lines that the trainings print.

    Returns:
        The verdict, the suggestion and every training.

    Raises:
        StudyError: If the study file or the training is at fault, if the study changed since it
            began, or if three trainings in a row crashed.
        KeyboardInterrupt: After Ctrl-C; what is done is kept, and no training is left running.
    """
    study = _overridden(
        load_study(path), max_runs=max_runs, jobs=jobs, storage=storage, time_limit=time_limit
    )
    with _locked(study) as place, explained(study.storage), quiet():
        if study.config.command is None and study.config.search.jobs:
            processes.warm_up()
        tell = progress or (lambda _: None)
        return Controller(study, tell, verbose=verbose, place=place).run()


def plan_of(
    path: str | os.PathLike[str] | Study,
    *,
    max_runs: int | None = None,
    storage: str | None = None,
) -> str:
    """What a search would run, how long it would take, and which sentences it can reach.

    Args:
        path: The study file, or a study that has none yet.
        max_runs: The budget, instead of the file's.
        storage: An Optuna storage URL, instead of the file's.

    Returns:
        Lines of text.
    """
    study = path if isinstance(path, Study) else load_study(path)
    study = _overridden(study, max_runs=max_runs, storage=storage)
    config = study.config.search
    # The split does not depend on the norms, so any will do before they are recorded.
    settings = settings_from(study.config, NormRecord.of(np.linspace(0.5, 1.5, 30)), 1.0)
    trials: tuple[Trial, ...] = ()
    if exists(study.storage, study.name):
        ledger = Ledger(study.storage, study.name, study.config.direction)
        trials = ledger.trials()
        settings = replace(ledger.settings or settings, max_runs=config.max_runs)
    return describe_plan(settings, trials, jobs=max(config.jobs, 1))


def _overridden(
    study: Study,
    *,
    max_runs: int | None = None,
    jobs: int | None = None,
    storage: str | None = None,
    time_limit: float | str | None = None,
) -> Study:
    seconds = duration(time_limit)
    if isinstance(seconds, float) and not seconds > 0:
        message = f"time_limit must be above 0 s but got {time_limit!r}"
        raise ValueError(message)
    given = {"max_runs": max_runs, "jobs": jobs, "storage": storage, "time_limit": seconds}
    for name, least in (("max_runs", 4), ("jobs", 0)):
        value = given[name]
        if isinstance(value, int) and value < least:
            message = f"{name} must be at least {least} but got {value}"
            raise ValueError(message)
    asked = {key: value for key, value in given.items() if value is not None}
    config = study.config.search.model_copy(update=asked)
    if config.jobs == 0:
        check_shared(storage or study.storage, "normtune search --jobs 0, with workers,")
    shared = study.config.metric_file is not None and "{run_dir}" not in study.config.metric_file
    if shared and config.jobs > 1:
        message = (
            f"{config.jobs} trainings at a time would write over each other's "
            f"{study.config.metric_file}: let the command write into {{run_dir}}, a folder of its "
            "own for each run, or give --jobs 1"
        )
        raise StudyError(message)
    return replace(study, config=study.config.model_copy(update={"search": config}))


@contextlib.contextmanager
def _locked(study: Study) -> Iterator[str]:
    """One controller at a time: two would run everything twice; a name of the lock."""
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
        file.seek(0)
        name = file.read() or uuid.uuid4().hex
        if not file.tell():
            file.write(name)
            file.flush()
        yield name
