"""What recorded norms prove: that a run repeats another one, and that the seed matters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from normtune.baseline import load_record, same_until_clipped
from normtune.errors import StudyError
from normtune.trials import Trial, same

if TYPE_CHECKING:
    from normtune.ledger import Ledger
    from normtune.records import NormRecord
    from normtune.study import Study


def record_of(study: Study, ledger: Ledger, number: int) -> NormRecord | None:
    """The norms of a trial; None where it recorded none, or they are gone."""
    return load_record(study.runs_folder / ledger.folders().get(number, ""))


def unclipped(ledger: Ledger, seed: int, lr_factor: float) -> int | None:
    """The number of the unclipped run of a seed and a rate that has ended; None without one."""
    runs = ledger.numbers().items()
    return next((number for number, t in runs if _is_unclipped(t, seed, lr_factor)), None)


def _is_unclipped(trial: Trial, seed: int, lr_factor: float) -> bool:
    alike = trial.seed == seed and same(trial.lr_factor, lr_factor)
    return alike and math.isinf(trial.max_norm) and trial.ended


def is_repeated(study: Study, ledger: Ledger, number: int) -> bool:
    """Whether a run repeats the unclipped one of its seed bit for bit until its first clipped step.

    True, too, where there is nothing to hold it against.
    """
    trial = ledger.numbers()[number]
    source = unclipped(ledger, trial.seed, trial.lr_factor)
    if source is None or source == number:
        return True
    base, own = record_of(study, ledger, source), record_of(study, ledger, number)
    return base is None or own is None or same_until_clipped(base, own, trial.max_norm)


def check_seed(study: Study, ledger: Ledger, number: int) -> None:
    """Refuse a training that ignores its seed; one pair of seeds that differ is proof enough.

    Raises:
        StudyError: If another seed of the same arm gave the same norms and the same value.
    """
    if ledger.fact("seed matters"):
        return
    trial = ledger.numbers()[number]
    for other, known in ledger.numbers().items():
        alike = known.arm == trial.arm and known.fraction == trial.fraction
        if not alike or known.seed == trial.seed or known.free or not known.ended:
            continue
        a, b = record_of(study, ledger, number), record_of(study, ledger, other)
        if a is None or b is None:
            continue
        n = min(len(a), len(b))  # of a worker's run the first norms are here
        if known.value == trial.value and np.array_equal(a.norms[:n], b.norms[:n], equal_nan=True):
            raise StudyError(_ignored_seed(study, f"seeds {known.seed} and {trial.seed}"))
        ledger.keep("seed matters", True)


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
