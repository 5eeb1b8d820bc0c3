"""What the callbacks of both Lightning packages do; each adds its own base class."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from normtune.recorder import NormRecorder
from normtune.records import SCHEDULE
from normtune.suggestion import Suggestion


class NormHooks:
    """Records the unclipped gradient norms of a Lightning training.

    Automatic and manual optimization, accumulation, clipping by norm and by value, several
    optimizers: nothing in the module changes. A checkpoint holds the record's place, and a
    training that is resumed from it continues the record.

    Args:
        path: The record file; without it the record stays in memory.
        options: As for `NormRecorder`: max_norm, groups, metadata and so on.

    Attributes:
        recorder: The `NormRecorder`, from the start of the first training on.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, **options: Any) -> None:
        super().__init__()
        self.recorder: NormRecorder | None = None
        self._path = path
        self._options = options
        self._state: dict[str, Any] = {}

    def suggest(self, **options: Any) -> Suggestion:
        """Suggest a max_norm from the norms so far.

        Args:
            options: As for `normtune.suggest`.

        Returns:
            The suggestion.

        Raises:
            ValueError: Before trainer.fit(), when nothing is recorded.
        """
        if self.recorder is None:
            message = "nothing is recorded yet: call suggest() after trainer.fit()"
            raise ValueError(message)
        return self.recorder.suggest(**options)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach a recorder to the trainer's optimizers."""
        metadata = _schedule(trainer, pl_module) | (self._options.get("metadata") or {})
        options = {**self._options, "metadata": metadata}
        self.recorder = NormRecorder(trainer.optimizers, self._path, **options)
        if self._state:
            self.recorder.load_state_dict(self._state)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Write what waits."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:  # noqa: ARG002
        """Write what waits."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the record."""
        return self._state if self.recorder is None else self.recorder.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """What `on_train_start` continues."""
        self._state = dict(state_dict)

    def _close(self) -> None:
        if self.recorder is not None:
            self.recorder.close()


def _schedule(trainer: Any, pl_module: Any) -> dict[str, int]:
    """How many steps the training takes, where the trainer can tell."""
    steps = math.inf
    with suppress(Exception):  # Lightning's own: it refuses where accumulation changes on the way
        steps = trainer.estimated_stepping_batches
    counted = pl_module.automatic_optimization and math.isfinite(steps)
    return {SCHEDULE: int(steps)} if counted else {}
