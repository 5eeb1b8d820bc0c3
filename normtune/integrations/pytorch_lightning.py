"""`NormCallback` for the package ``pytorch_lightning``.

    trainer = pytorch_lightning.Trainer(callbacks=[NormCallback("run.norms.jsonl")], ...)
"""

from __future__ import annotations

from pytorch_lightning import Callback

from normtune.integrations.hooks import NormHooks


class NormCallback(NormHooks, Callback):
    """See `normtune.integrations.hooks.NormHooks`."""
