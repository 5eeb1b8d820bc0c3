"""What a study's `train(run)` is given where its file is run by hand."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


def train_by_hand(train: Callable[[Any], None]) -> None:
    """Train on seed 0 with the file's own settings and print every report."""
    train(
        SimpleNamespace(
            seed=0,
            params={},
            device="cpu",
            fraction=1.0,
            watch=lambda *_, **__: None,
            report=lambda value, step: print(f"step {step:4d}  validation loss {value:.4f}"),
        )
    )
