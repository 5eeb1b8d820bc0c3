"""`NormCallback` for ``pytorch_lightning``: ``Trainer(callbacks=[NormCallback(path)])``."""

from __future__ import annotations

from pytorch_lightning import Callback

from normtune.integrations.hooks import NormHooks


class NormCallback(NormHooks, Callback):
    """See `normtune.integrations.hooks.NormHooks`."""
