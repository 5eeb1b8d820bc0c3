"""`NormRecord`: the norms of one run."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from normtune import markup
from normtune.format import number
from normtune.records.lines import Floats

if TYPE_CHECKING:
    import pandas as pd

ANONYMOUS = "norm"  # the series of a record that never named one
SCHEDULE = "schedule_steps"  # in the metadata: how many steps the whole training takes, if known

ClipSide = Literal["before", "after", "unknown"]


@dataclass(frozen=True)
class Finding:
    """Something about a clip call that the user should know.

    Attributes:
        kind: A short name such as ``"clip-before-backward"``.
        text: The sentence for the user, with file and line of the call.
        site: ``file:line`` of the clip call, or ``""``.
        step: The step at which it was first seen.
        count: How often it was seen.
        blocks: Whether norms recorded like this cannot carry a suggestion.
    """

    kind: str
    text: str
    site: str = ""
    step: int = 0
    count: int = 1
    blocks: bool = False


@dataclass(frozen=True)
class Origin:
    """Where a record's values come from.

    Attributes:
        path: The file that was read, ``""`` for values from memory.
        kind: The family of the file, such as ``"normtune record"`` or ``"trainer_state.json"``.
        key: The key, column or tag that holds the norm.
        clip_side: Whether the values are norms before or after clipping.
        value: What one value stands for.
        notes: Sentences on what was left out and what else the source holds.
    """

    path: str = ""
    kind: str = "normtune record"
    key: str = "norm"
    clip_side: ClipSide = "before"
    value: Literal["each step", "last of window", "mean of window", "unknown"] = "each step"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class NormRecord:
    """Unclipped gradient norms of one run; all arrays have one entry a step, shape ``(n,)``.

    Attributes:
        steps: Step numbers, int64. The first step is 1.
        norms: Total norm before clipping, float64; nan or inf where it was not finite.
        max_norm: The max_norm in force at each step; inf where nothing clips, nan where unknown.
        lr: Learning rate of the first parameter group; nan where unknown.
        skipped: Steps that a GradScaler skipped; they stay outside all statistics.
        belted: Warm-up steps that the belt of ``clip_after`` clipped or skipped.
        groups: Norm per parameter or group, name -> array of shape ``(n,)``; may be empty.
        series: The name of this series: a clip call's ``file:line``, or the optimizer.
        metadata: The header of the record: optimizer, norm_type, torch version and so on.
        findings: What was found about the clip calls.
        origin: Where the values come from.
    """

    steps: npt.NDArray[np.int64]
    norms: Floats
    max_norm: Floats
    lr: Floats
    skipped: npt.NDArray[np.bool_]
    belted: npt.NDArray[np.bool_]
    groups: Mapping[str, Floats] = field(default_factory=dict)
    series: str = ANONYMOUS
    metadata: Mapping[str, Any] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    origin: Origin = Origin()

    @classmethod
    def of(
        cls,
        norms: npt.ArrayLike,
        *,
        steps: npt.ArrayLike | None = None,
        max_norm: npt.ArrayLike = np.nan,
        lr: npt.ArrayLike = np.nan,
        series: str = ANONYMOUS,
        metadata: Mapping[str, Any] | None = None,
        origin: Origin | None = None,
    ) -> NormRecord:
        """Build a record from plain numbers.

        Args:
            norms: One norm a step, shape ``(n,)``; nan and inf are kept.
            steps: Step numbers; 1 to n without.
            max_norm: The max_norm in force, one number or one a step.
            lr: The learning rate, one number or one a step.
            series: The name of the series.
            metadata: What else is known about the run.
            origin: Where the values come from.

        Returns:
            The record.

        Raises:
            ValueError: If `norms` is not one-dimensional and numeric.
        """
        values = _floats(norms)
        n = len(values)
        return cls(
            steps=np.arange(1, n + 1) if steps is None else np.asarray(steps, dtype=np.int64),
            norms=values,
            max_norm=np.broadcast_to(np.asarray(max_norm, dtype=np.float64), (n,)).copy(),
            lr=np.broadcast_to(np.asarray(lr, dtype=np.float64), (n,)).copy(),
            skipped=np.zeros(n, dtype=bool),
            belted=np.zeros(n, dtype=bool),
            series=series,
            metadata=MappingProxyType(dict(metadata or {})),
            origin=origin or Origin(path="", kind="numbers from memory"),
        )

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, series: str | None = None, attempt: int | None = None
    ) -> NormRecord:
        """Read a ``*.norms.jsonl`` file.

        Args:
            path: The file.
            series: Which series; without it the one with most steps.
            attempt: Which start of the run, counted from 1 (negative from the end); without it
                the last start together with those that it continues.

        Returns:
            The record of one series.

        Raises:
            RecordError: If the file is missing, is not a record, or has no such series or attempt.
        """
        from normtune.records.assembly import load  # it makes records

        return load(path, series=series, attempt=attempt)

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        return (
            f"NormRecord({len(self)} steps of {self.series!r} from {self.origin.path or 'memory'})"
        )

    @property
    def finite(self) -> Floats:
        """The norms that statistics use: finite, and of steps that really happened."""
        return self.norms[np.isfinite(self.norms) & ~self.skipped]

    @property
    def current(self) -> float | None:
        """The max_norm that the loop itself asked for last; None where unknown or off."""
        asked = self.metadata.get("asked_max_norm")
        if isinstance(asked, int | float) and math.isfinite(asked) and asked > 0:
            return float(asked)
        known = self.max_norm[~np.isnan(self.max_norm)]
        imposed = self.metadata.get("imposed") is not None
        return float(known[-1]) if len(known) and np.isfinite(known[-1]) and not imposed else None

    def skip(self, n: int) -> NormRecord:
        """Leave out the start of a run.

        Args:
            n: How many steps.

        Returns:
            The same record without them.
        """
        keep = slice(n, None)
        return replace(
            self,
            steps=self.steps[keep],
            norms=self.norms[keep],
            max_norm=self.max_norm[keep],
            lr=self.lr[keep],
            skipped=self.skipped[keep],
            belted=self.belted[keep],
            groups={name: values[keep] for name, values in self.groups.items()},
        )

    def _repr_html_(self) -> str:
        return _html(self)

    def to_frame(self) -> pd.DataFrame:
        """A pandas DataFrame with one row a step."""
        import pandas as pd

        columns = {
            "step": self.steps,
            "norm": self.norms,
            "max_norm": self.max_norm,
            "lr": self.lr,
            "skipped": self.skipped,
        }
        return pd.DataFrame(columns | {f"group {k}": v for k, v in self.groups.items()})


def _html(record: NormRecord) -> str:
    finite = record.finite
    rows: list[tuple[str, object]] = [("steps", len(record)), ("series", record.series)]
    if len(finite):
        ends = (float(finite.min()), float(np.median(finite)), float(finite.max()))
        names = ("smallest norm", "median norm", "largest norm")
        rows += list(zip(names, map(number, ends), strict=True))
    rows.append(("not finite", int((~np.isfinite(record.norms)).sum())))
    rows += [
        (key, record.metadata[key]) for key in ("optimizer", "torch") if key in record.metadata
    ]
    name = record.origin.path or "memory"
    picture = markup.sparkline(finite, "norms over the steps, on a logarithmic scale")
    notes = markup.points((*record.origin.notes, *(f.text for f in record.findings)))
    return (
        f"<p><b>NormRecord</b> from {markup.text(name)}</p>{picture}{markup.table((), rows)}{notes}"
    )


def _floats(values: npt.ArrayLike) -> Floats:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        message = "norms must be numbers but got values that are not; check the column or list"
        raise ValueError(message) from None
    if array.ndim != 1:
        message = f"norms must be one-dimensional but got shape {array.shape}"
        raise ValueError(message)
    return array
