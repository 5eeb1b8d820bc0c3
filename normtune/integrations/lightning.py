"""`NormCallback` for ``lightning``: ``Trainer(callbacks=[NormCallback(path)])``."""

from __future__ import annotations

from lightning.pytorch import Callback

from normtune.integrations.hooks import NormHooks


class NormCallback(NormHooks, Callback):
    """See `normtune.integrations.hooks.NormHooks`."""
