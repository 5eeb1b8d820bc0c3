"""`NormCallback` for the Hugging Face Trainer, and for those built on it (TRL, Axolotl)."""

from __future__ import annotations

import os
from typing import Any

from transformers import TrainerCallback

from normtune.recorder import NormRecorder
from normtune.records import SCHEDULE
from normtune.suggestion import Suggestion


class NormCallback(TrainerCallback):
    """Records the unclipped gradient norm of every step, where the Trainer logs only some.

    Args:
        path: The record file; without it the record stays in memory.
        options: As for `NormRecorder`: max_norm, groups, metadata and so on.

    Attributes:
        recorder: The `NormRecorder`, from the start of the first training on.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, **options: Any) -> None:
        self.recorder: NormRecorder | None = None
        self._path = path
        self._options = options

    def suggest(self, **options: Any) -> Suggestion:
        """Suggest a max_norm from the norms so far.

        Args:
            options: As for `normtune.suggest`.

        Returns:
            The suggestion.

        Raises:
            ValueError: Before trainer.train(), when nothing is recorded.
        """
        if self.recorder is None:
            message = "nothing is recorded yet: call suggest() after trainer.train()"
            raise ValueError(message)
        return self.recorder.suggest(**options)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Attach a recorder; a training that resumes continues the record."""
        resume = self._path is not None and state.global_step > 0
        facts = {SCHEDULE: state.max_steps, **(self._options.get("metadata") or {})}
        options = {"resume": resume, **self._options, "metadata": facts}
        self.recorder = NormRecorder(kwargs["optimizer"], self._path, **options)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Write what waits."""
        if self.recorder is not None:
            self.recorder.close()
