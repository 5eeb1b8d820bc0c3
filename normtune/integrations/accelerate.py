"""`record` for Accelerate: a recorder whose place is in the accelerator's checkpoints."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from normtune.recorder import NormRecorder

if TYPE_CHECKING:
    from accelerate import Accelerator


def record(
    accelerator: Accelerator,
    optimizer: Any,
    path: str | os.PathLike[str] | None = None,
    **options: Any,
) -> NormRecorder:
    """Record the unclipped gradient norm of every step of a prepared optimizer.

    `accelerator.save_state` keeps the record's place, and after `accelerator.load_state` it goes
    on there. A plain `NormRecorder(optimizer, path)` works too.

    Args:
        accelerator: The accelerator.
        optimizer: One optimizer or several, prepared or not.
        path: The record file; without it the record stays in memory.
        options: As for `NormRecorder`: max_norm, groups, metadata and so on.

    Returns:
        The recorder; close it, or let the program end.
    """
    steps = accelerator.gradient_accumulation_steps
    metadata = {"gradient_accumulation_steps": steps, **options.pop("metadata", {})}
    recorder = NormRecorder(optimizer, path, metadata=metadata, **options)
    accelerator.register_for_checkpointing(recorder)
    return recorder
