"""What recorded norms give a search: its settings, its range, the facts of a run, its proofs."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from normtune import statistics
from normtune.doubts import is_adaptive
from normtune.errors import RecordError
from normtune.records import SCHEDULE, NormRecord
from normtune.tasks import RECORD
from normtune.trials import Settings

if TYPE_CHECKING:
    from normtune.study import StudyConfig

# The range of the search (DESIGN 4): acceptable values of all tasks tried lay within it.
BELOW_MEDIAN, BELOW_SMALLEST, BELOW_SMALLEST_ADAPTIVE, ABOVE_MEDIAN = 100.0, 30.0, 4.0, 10.0
LEAST_NORMS = 30  # of a first quarter


def settings_from(
    config: StudyConfig, warmup: NormRecord, suggestion: float, largest: float = math.inf
) -> Settings:
    """What the planner works with.

    Args:
        config: The study file.
        warmup: The unclipped norms that the suggestion comes from.
        suggestion: The suggested max_norm.
        largest: The largest finite norm of the whole unclipped run.
    """
    search = config.search
    positive = warmup.finite[warmup.finite > 0]
    optimizer = str(warmup.metadata.get("optimizer", ""))
    low, high = search_range(positive, largest=largest, adaptive=is_adaptive(optimizer))
    rates = warmup.lr[np.isfinite(warmup.lr)]
    return Settings(
        max_runs=search.max_runs,
        lr_runs=search.lr_runs,
        margin=search.margin,
        direction=config.direction,
        seed=search.seed,
        suggestion=suggestion,
        current=warmup.current,
        low=low,
        high=high,
        adaptive=is_adaptive(optimizer),
        half_precision=str(warmup.metadata.get("dtype")) in ("float16", "bfloat16"),
        explore_fraction=search.explore_fraction,
        min_seeds=search.min_seeds,
        lr=float(rates.max()) if len(rates) else None,
    )


def search_range(norms: Any, *, largest: float, adaptive: bool) -> tuple[float, float]:
    """Where a max_norm is searched: the smallest and the largest value.

    Norms mostly fall, so that 10 x the median of a whole run may lie below all that mattered while
    it learned: the median of the first quarter counts as well.

    Args:
        norms: Positive unclipped norms of the warm-up, in their order.
        largest: The largest finite norm of the whole unclipped run.
        adaptive: Whether the optimizer is Adam-like.

    >>> search_range([1.0, 2.0, 3.0], largest=50.0, adaptive=False)
    (0.02, 20.0)
    """
    quarter = max(len(norms) // 4, min(LEAST_NORMS, len(norms)))
    medians = float(np.median(norms)), float(np.median(norms[:quarter]))
    below = BELOW_SMALLEST_ADAPTIVE if adaptive else BELOW_SMALLEST
    low = min(min(medians) / BELOW_MEDIAN, float(np.min(norms)) / below)
    return low, max(min(largest, ABOVE_MEDIAN * max(medians)), *medians)


def load_record(folder: Path) -> NormRecord | None:
    """The norms that a run recorded in its folder; None where it recorded none."""
    try:
        return NormRecord.load(folder / RECORD)
    except RecordError:
        return None


def norm_facts(folder: Path, max_norm: float) -> dict[str, float]:
    """What a run's norms say about it, for the planner; empty where it recorded none.

    Args:
        folder: The run's folder.
        max_norm: What it was clipped at.
    """
    record = load_record(folder)
    if record is None or not len(record.finite):
        return {}
    every = np.concatenate([r.norms[~r.skipped] for r in _all_series(folder / RECORD)])
    finite = every[np.isfinite(every)]
    clips = math.isfinite(max_norm)
    effect = statistics.clip_effect(record.finite, max_norm) if clips else None
    return {
        "largest_norm": float(every.max()) if len(finite) == len(every) else math.inf,
        "smallest_norm": float(finite.min()),
        "clip_share": effect.share if effect else 0.0,
        "kept": effect.kept if effect else 1.0,
    }


def _all_series(file: Path) -> list[NormRecord]:
    """A run that clips at several places repeats the unclipped one only if none of them acts."""
    with file.open(encoding="utf-8") as lines:
        named = [json.loads(line) for line in lines if '"series"' in line]
    found = []
    for name in dict.fromkeys(str(line["series"]) for line in named if "series" in line):
        with suppress(RecordError):  # declared, and then never seen
            found.append(NormRecord.load(file, series=name))
    return found or [NormRecord.load(file)]


def same_until_clipped(base: NormRecord, own: NormRecord, max_norm: float) -> bool:
    """Whether the norms agree bit for bit up to the first step that was clipped."""
    n = min(len(base), len(own))
    clipped = np.flatnonzero(~(statistics.coefficients(own.norms[:n], max_norm) >= 1))
    end = int(clipped[0]) + 1 if len(clipped) else n
    return np.array_equal(base.norms[:end], own.norms[:end], equal_nan=True)


def first_steps(record: NormRecord, n: int | None) -> NormRecord:
    """The first `n` steps of a whole run, all without `n`; they know how long the schedule is."""
    arrays = ("steps", "norms", "max_norm", "lr", "skipped", "belted")
    groups = {name: values[:n] for name, values in record.groups.items()}
    cut = {name: getattr(record, name)[:n] for name in arrays}
    metadata = MappingProxyType({**record.metadata, SCHEDULE: len(record)})
    return replace(record, groups=groups, metadata=metadata, **cut)
