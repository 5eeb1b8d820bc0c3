"""What a run is to do as a task, and what its outcome is entered as, here or on another machine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normtune import processes
from normtune.baseline import norm_facts
from normtune.errors import StudyError
from normtune.ledger import Ledger, Result
from normtune.processes import Child
from normtune.pruning import Pruner, pruner_of
from normtune.records import NormRecord
from normtune.study import WARMUP_STEPS, Study
from normtune.tasks import RESULT, Outcome, Task, value_of
from normtune.trials import Trial, state_of

if TYPE_CHECKING:
    from normtune.plan import Planned


def task_of(study: Study, threads: int, planned: Planned, folder: Path) -> Task:
    """The task of a planned run."""
    return replace(
        _task(study, threads, folder),
        seed=planned.seed,
        max_norm=planned.max_norm,
        lr_factor=planned.lr_factor,
        fraction=planned.fraction,
    )


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
        finish_diverged=config.search.finish_diverged,
    )


def pruner_for(study: Study, ledger: Ledger, planned: Planned) -> Pruner | None:
    """What ends a hopeless run early; a run that is compared over seeds is always whole."""
    if not study.config.search.prune or planned.stage == "confirm":
        return None
    return pruner_of(ledger.curves(planned.seed), study.config.direction)


def result_of(study: Study, outcome: Outcome, folder: Path, max_norm: float) -> Result:
    """What a run is entered as.

    Args:
        study: The study.
        outcome: How the run ended.
        folder: The run's folder, with its record.
        max_norm: What it was clipped at.
    """
    config = study.config
    value = None
    state: str = "crashed"
    if outcome.ending in ("finished", "pruned"):
        value = value_of(outcome.values, config.search.value, config.direction)
        state = state_of(value, outcome.first_value, config.direction)
    elif outcome.ending == "diverged":
        state = "diverged"
    facts = {
        "seconds": outcome.seconds,
        "reason": outcome.reason,
        "first_value": outcome.first_value,
        "diverged": state == "diverged",
        "pruned": outcome.ending == "pruned" or None,
        "unusable": outcome.ending == "unusable" or None,
        # The trial's own is what it reported last.
        "value": value if outcome.ending == "pruned" else None,
    }
    known = {key: fact for key, fact in facts.items() if fact is not None}
    return Result(state, value, outcome.values, known | norm_facts(folder, max_norm))


# --- the warm-up ---


def warmup_task(study: Study, threads: int) -> Task:
    """The task that records the unclipped warm-up of a study and then stops by itself."""
    folder = study.runs_folder / "warmup"
    (folder / RESULT).unlink(missing_ok=True)
    steps = study.config.warmup_steps or WARMUP_STEPS
    return replace(_task(study, threads, folder), stop_after=steps)


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


# --- one study, wherever it runs ---


def refuse_changes(study: Study, began: Mapping[str, Any], *, way_out: str) -> None:
    """Refuse a study that is not the one that began.

    Args:
        study: The study as it is now.
        began: The fingerprint that it began with.
        way_out: What to do.

    Raises:
        StudyError: With each key, what it was and what it is now.
    """
    now = study.fingerprint()
    changed = [key for key in {**began, **now} if began.get(key) != now.get(key)]
    if changed:
        changes = "; ".join(f"{k} was {_shown(began, k)}, now {_shown(now, k)}" for k in changed)
        message = f"{study.path} changed since this study began: {changes}. {way_out}"
        raise StudyError(message)


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if flat.get(key) is not None else "absent"


# --- words ---


def words(run: Planned | Trial | Task) -> str:
    """A run in words: its max_norm, its rate and its seed."""
    clip = f"max_norm {run.max_norm:.3g}" if math.isfinite(run.max_norm) else "no clipping"
    rate = "" if run.lr_factor == 1.0 else f" at {run.lr_factor:.3g}x the rate"
    return f"{clip}{rate}, seed {run.seed}"


def outcome_words(state: str, value: float | None, outcome: Outcome) -> str:
    """How a run ended in words."""
    took = f" in {outcome.seconds:.1f} s" if math.isfinite(outcome.seconds) else ""
    if value is not None:
        stuck = " (no better than its first report)" if state == "stuck" else ""
        ended = f": {outcome.reason}" if outcome.reason else ""
        return f"{value:.5g}{stuck}{took}{ended}"
    return f"{state}{took}: {outcome.reason}"
