"""What a run is told (`Task`), and what comes back from it (`Outcome`)."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from normtune import records
from normtune.pruning import Pruner

Ending = Literal["finished", "diverged", "pruned", "stopped", "crashed", "unusable"]
RECORD = f"run{records.SUFFIX}"
RESULT = "result.json"
OUTPUT = "output.txt"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
REPORTED = "report_metric"  # the metric of a script that calls normtune.report_metric(value)
_TOKEN = re.compile(r"\{(seed|run_dir)\}")


@dataclass(frozen=True)
class Task:
    """One training that a process of its own carries out.

    Attributes:
        folder: The run's own folder: its record, its output and its result.
        train: The training as the study file names it; empty for a command.
        home: The folder of the study file: `train` is imported from it, a command runs in it.
        seed: The seed of the run.
        params: What the training gets as ``run.params``.
        max_norm: What to clip at; inf is no clipping.
        lr_factor: What to multiply the learning rate by.
        fraction: The share of the schedule to train.
        threads: torch's threads.
        device: The device that the user asked for; None takes a GPU where there is one.
        slot: Which of the parallel runs this is; it picks the GPU.
        slots: How many runs go at a time.
        stop_after: End after so many steps; None trains to the end.
        record: The record file; None is one in `folder`.
        metadata: Facts for the header of the record.
        command: The training as a command; ``{seed}`` and ``{run_dir}`` stand for those of the run.
        seed_inside: Whether torch, numpy and random are seeded inside the command.
        metric: The pattern of the validation value in the command's output, or `REPORTED`.
        metric_file: The file that the command writes it to, and the key: ``path:key``.
        finish_diverged: Whether a training whose norms say that it has diverged goes on.
        pruner: Tells which reports are hopeless; None ends no run for that.
    """

    folder: Path
    train: str
    home: Path
    seed: int
    params: Mapping[str, Any] = field(default_factory=dict)
    max_norm: float = math.inf
    lr_factor: float = 1.0
    fraction: float = 1.0
    threads: int = 1
    device: str | None = None
    slot: int = 0
    slots: int = 1
    stop_after: int | None = None
    record: Path | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    seed_inside: bool = False
    metric: str | None = None
    metric_file: str | None = None
    finish_diverged: bool = False
    pruner: Pruner | None = None

    @property
    def record_path(self) -> Path:
        """Where the norms are recorded."""
        return self.record or self.folder / RECORD

    @property
    def argv(self) -> list[str]:
        """The command of this run."""
        return [self.filled(part) for part in self.command]

    def filled(self, text: str) -> str:
        """`text` with ``{seed}`` and ``{run_dir}`` replaced, and nothing else.

        >>> Task(Path("/r"), "", Path(), seed=3).filled('{"seed": {seed}, "out": "{run_dir}/{x}"}')
        '{"seed": 3, "out": "/r/{x}"}'
        """
        known = {"seed": str(self.seed), "run_dir": str(self.folder.absolute())}
        return _TOKEN.sub(lambda token: known[token[1]], text)


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        ending: Finished, diverged, pruned as hopeless, stopped after its warm-up, crashed, or
            unusable: the training itself is at fault, and no other run would do better.
        values: The reported values as (step, value); a non-finite one ended the run.
        reason: Why it did not finish, in words.
        seconds: How long the training took.
    """

    ending: Ending
    values: tuple[tuple[int, float], ...] = ()
    reason: str = ""
    seconds: float = math.nan

    @property
    def first_value(self) -> float | None:
        """The first reported value; None where there was at most one."""
        return self.values[0][1] if len(self.values) > 1 else None

    def save(self, folder: Path) -> None:
        """Write the outcome; a reader finds a whole one or none."""
        temporary = folder / f"{RESULT}.{os.getpid()}"
        temporary.write_text(records.dumps(self.__dict__), encoding="utf-8")
        temporary.replace(folder / RESULT)

    @classmethod
    def load(cls, folder: Path) -> Outcome | None:
        """The outcome that a run left in its folder; None where it left none."""
        try:
            plain = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        values = tuple((int(step), float(value)) for step, value in plain["values"])
        return cls(plain["ending"], values, plain["reason"], float(plain["seconds"]))


def value_of(
    values: Sequence[tuple[int, float]],
    rule: Literal["last", "best", "mean of last 3"],
    direction: Literal["minimize", "maximize"],
) -> float:
    """The one value of a run that counts.

    Args:
        values: Its reported values as (step, value), at least one.
        rule: Which of them counts.
        direction: Whether the best is the lowest or the highest.

    >>> value_of([(1, 3.0), (2, 1.0), (3, 2.0)], "best", "minimize")
    1.0
    """
    reported = [value for _, value in values]
    if rule == "best":
        return min(reported) if direction == "minimize" else max(reported)
    kept = reported[-1:] if rule == "last" else reported[-3:]
    return sum(kept) / len(kept)
