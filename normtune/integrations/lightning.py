"""`NormCallback` for the package ``lightning``.

    trainer = lightning.Trainer(callbacks=[NormCallback("run.norms.jsonl")], ...)
"""

from __future__ import annotations

from lightning.pytorch import Callback

from normtune.integrations.hooks import NormHooks


class NormCallback(NormHooks, Callback):
    """See `normtune.integrations.hooks.NormHooks`."""
