"""A study that was searched, written into its storage without any training."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from small_study import write_study

from normtune.ledger import Ledger, Result
from normtune.plan import Planned
from normtune.records import RecordWriter, dumps, header, row
from normtune.study import load_study
from normtune.suggestion import suggest
from normtune.trials import Settings

SEEDS = (1, 2, 3, 4)
NORMS = np.random.default_rng(0).lognormal(0.0, 0.6, 120)
SETTINGS = Settings(24, suggestion=0.5, low=0.01, high=5.0, current=2.0, lr=0.1)


def write_record(path: Path, norms=NORMS, **facts) -> Path:
    """A record file with these norms."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = RecordWriter(path)
    writer.write([dumps(header(**{"optimizer": "SGD", "lr": 0.1, **facts}))])
    writer.write([row(i, float(x)) for i, x in enumerate(norms, 1)])
    writer.close()
    return path


def runs(suggestion: float):
    """Planned runs with how they ended: the suggestion helps, no clipping fails once."""
    none = math.inf
    explore = [(none, 1.0, 2.0), (suggestion, 1.0, 1.0), (0.05, 1.0, 9.0), (10.0, 1.0, 2.0)]
    for max_norm, factor, value in (*explore, (none, 1 / 3, 1.5), (none, 0.1, 1.8)):
        stage = "explore" if factor == 1 else "lr"
        yield Planned(max_norm, factor, 0, stage, free=max_norm == 10, reason=""), value
    for seed in SEEDS:
        for max_norm, factor, value in (
            (none, 1.0, 2.0),
            (suggestion, 1.0, 1.0),
            (none, 1 / 3, 1.5),
        ):
            fails = max_norm == none and factor == 1 and seed == 4
            noisy = math.nan if fails else value + 0.01 * (seed % 3)
            yield Planned(max_norm, factor, seed, "confirm", free=False, reason=""), noisy


def write_finished(folder: Path) -> Path:
    """The study file of a search that has ended."""
    path = write_study(folder)
    study = load_study(path)
    suggestion = suggest(NORMS[: study.config.warmup_steps])
    ledger = Ledger(study.storage, study.name, "minimize")
    ledger.settings = replace(SETTINGS, suggestion=suggestion.max_norm)
    ledger.keep("suggestion", suggestion.to_dict())
    ledger.keep("notes", ["a note of the search"])
    for planned, value in runs(suggestion.max_norm):
        number, name = ledger.begin(planned)
        state = "finished" if math.isfinite(value) else "diverged"
        facts = {"clip_share": 0.1, "kept": 0.9, "seconds": 2.0, "first_value": 9.5}
        ledger.end(number, Result(state, value if state == "finished" else None, facts=facts))
        if number == 0:
            write_record(study.runs_folder / name / "run.norms.jsonl")
    return path
