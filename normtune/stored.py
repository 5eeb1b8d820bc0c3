"""What a study has found, read back from its storage without any training."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from normtune.baseline import first_steps, load_record
from normtune.comparison import verdict
from normtune.errors import RecordError, StudyError, SuggestionError
from normtune.ledger import Ledger
from normtune.plan import next_runs
from normtune.results import SearchResult
from normtune.storages import exists, masked
from normtune.study import Study, load_study
from normtune.suggestion import Suggestion, suggest
from normtune.trials import same

if TYPE_CHECKING:
    from normtune.records import NormRecord


def load_result(path: str | os.PathLike[str], *, storage: str | None = None) -> SearchResult:
    """What a search has found so far; nothing is trained, and a search may be under way.

    Args:
        path: The study file.
        storage: An Optuna storage URL, instead of the file's.

    Returns:
        The verdict, the suggestion and every training so far.

    Raises:
        StudyError: If the study file is at fault, or its search has no result yet.
    """
    study = _study(path, storage)
    return result_from(study, _ledger(study))


def result_from(study: Study, ledger: Ledger) -> SearchResult:
    """What the study has found so far.

    Raises:
        StudyError: If its unclipped run has not ended.
    """
    settings, trials = ledger.settings, ledger.trials()
    if settings is None:
        message = (
            f"{study.path}: the unclipped run has not ended yet, so there is nothing to compare"
        )
        raise StudyError(message)
    return SearchResult(
        name=study.name,
        storage=masked(study.storage),
        verdict=verdict(settings, trials),
        suggestion=ledger.fact("suggestion", {}),
        settings=settings,
        trials=trials,
        notes=ledger.notes(),
        why_ended=next_runs(settings, trials).reason,
    )


def load_suggestion(
    path: str | os.PathLike[str], *, storage: str | None = None
) -> Suggestion | None:
    """The suggestion of a study with the norms behind it.

    Returns:
        The suggestion from the warm-up of the unclipped run; None where its record is gone, or
        where it is not what the study's suggestion was made from.

    Raises:
        StudyError: If the study file is at fault, or its search has not begun.
    """
    study = _study(path, storage)
    ledger = _ledger(study)
    settings = ledger.settings
    record = _unclipped_record(study, ledger)
    if settings is None or record is None:
        return None
    warmup = first_steps(record, study.config.warmup_steps)
    with suppress(SuggestionError, RecordError):
        made = suggest(warmup, rule=study.config.rule)
        return made if same(made.max_norm, settings.suggestion) else None
    return None


def _unclipped_record(study: Study, ledger: Ledger) -> NormRecord | None:
    seed, folders = study.config.search.seed, ledger.folders()
    for number, trial in ledger.numbers().items():
        if trial.arm == (math.inf, 1.0) and trial.seed == seed and trial.ended and not trial.free:
            return load_record(study.runs_folder / folders.get(number, ""))
    return None


def _study(path: str | os.PathLike[str], storage: str | None) -> Study:
    study = load_study(path)
    if storage is None:
        return study
    search = study.config.search.model_copy(update={"storage": storage})
    return replace(study, config=study.config.model_copy(update={"search": search}))


def _ledger(study: Study) -> Ledger:
    if not exists(study.storage, study.name):
        message = (
            f"{study.path} was not searched yet: {masked(study.storage)} holds no study "
            f"{study.name!r}; run: normtune search {study.path}"
        )
        raise StudyError(message)
    return Ledger(study.storage, study.name, study.config.direction)
