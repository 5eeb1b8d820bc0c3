"""What the processes of a watched command are told, and the marks that they leave behind."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from normtune import records

FOLDER, ORDERS = "NORMTUNE_RUN", "NORMTUNE_ORDERS"  # environment variables
INJECT = Path(__file__).parent / "inject"  # holds the sitecustomize.py that lets normtune in

# Marks, one file a process: <kind>-<pid> in the run's folder.
PYTHON = "python"  # a Python process started with normtune before it
TORCH = "torch"  # it imported torch, and every clip call and step is seen
FAILED = "failed"  # normtune could not work there; the text says why
DIVERGED = "diverged"  # its norms say that the training has; the text says how
OVER = "over"  # it ended in its own time; the text says what it had
ENOUGH = "enough"  # the steps that were asked for are recorded


@dataclass(frozen=True)
class Orders:
    """What normtune does in each process of a command.

    Attributes:
        folder: The run's folder, for records and marks.
        max_norm: What is imposed: None leaves the loop's clipping, inf clips nothing.
        lr_factor: Multiplies the learning rate during the arithmetic of each step.
        seed: What torch, numpy and random are seeded with; None leaves them.
        steps: End the process after so many recorded steps.
        metadata: Facts for the header of the record.
        stop_diverged: Leave a mark where the norms are no longer finite, or explode.
    """

    folder: Path
    max_norm: float | None = None
    lr_factor: float = 1.0
    seed: int | None = None
    steps: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    stop_diverged: bool = False

    def environment(self, base: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment `base` (that of this process without it) with these orders in it."""
        env = dict(os.environ if base is None else base)
        others = [part for part in env.get("PYTHONPATH", "").split(os.pathsep) if part]
        env["PYTHONPATH"] = os.pathsep.join([str(INJECT), *others])
        env[FOLDER] = str(self.folder.absolute())
        env[ORDERS] = records.dumps({k: v for k, v in asdict(self).items() if k != "folder"})
        return env

    @classmethod
    def of_environment(cls) -> Orders:
        """The orders that this process was started with."""
        plain = json.loads(os.environ[ORDERS])
        if plain["max_norm"] is not None:
            plain["max_norm"] = float(plain["max_norm"])
        return cls(folder=Path(os.environ[FOLDER]), **plain)

    @property
    def imposes(self) -> bool:
        """Whether a process that normtune cannot work in must not count."""
        return self.max_norm is not None or self.lr_factor != 1.0

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ValueError: With the argument and what came.
        """
        if self.max_norm is not None and not self.max_norm > 0:
            message = f"max_norm must be a number above 0, or inf, but got {self.max_norm}"
            raise ValueError(message)
        if not 0 < self.lr_factor < math.inf:
            message = f"lr_factor must be a finite number above 0 but got {self.lr_factor}"
            raise ValueError(message)
        if self.steps is not None and self.steps < 1:
            message = f"steps must be at least 1 but got {self.steps}"
            raise ValueError(message)


def mark(folder: Path, kind: str, text: str = "") -> None:
    """Leave a mark of this process; a folder that is gone stays gone."""
    try:
        (folder / f"{kind}-{os.getpid()}").write_text(text, encoding="utf-8")
    except OSError:
        return


def marks(folder: Path, kind: str) -> dict[int, str]:
    """The marks of one kind: process id -> text."""
    found = sorted(folder.glob(f"{kind}-*"))
    return {
        int(path.name.rpartition("-")[2]): path.read_text(encoding="utf-8", errors="replace")
        for path in found
    }
