"""Handwritten digits read row by row by an LSTM, with SGD: the control.

Eight time steps are too few for gradients to explode, so clipping should hardly matter here.
"""

import functools

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

BATCH = 32
DEFAULTS = {"optimizer": "SGD", "lr": 1.0, "steps": 400, "hidden": 48}


class Rows(nn.Module):
    """Images in, logits of the ten digits out."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, hidden, batch_first=True)
        self.out = nn.Linear(hidden, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of shape (batch, 10) for images of shape (batch, 8, 8)."""
        return self.out(self.lstm(x)[0][:, -1])


@functools.cache
def load() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images and labels, then those for validation; the same split for every seed."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    kept, held_out = order[:1200], order[1200:]
    return images[kept], labels[kept], images[held_out], labels[held_out]


def train(run) -> None:  # noqa: ANN001 - a normtune Run, or anything that looks like one
    """Train on one seed and report the validation loss, first that of the untrained model."""
    params = DEFAULTS | run.params
    steps = round(params["steps"] * run.fraction)
    x, y, validation_x, validation_y = (part.to(run.device) for part in load())

    torch.manual_seed(run.seed)
    batches = torch.Generator().manual_seed(run.seed)
    model = Rows(params["hidden"]).to(run.device)
    optimizer = getattr(torch.optim, params["optimizer"])(model.parameters(), lr=params["lr"])
    run.watch(optimizer)

    def report(step: int) -> None:
        with torch.no_grad():
            run.report(cross_entropy(model(validation_x), validation_y).item(), step)

    report(0)
    for step in range(1, steps + 1):
        batch = torch.randint(len(x), (BATCH,), generator=batches).to(run.device)
        loss = cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (steps // 8) == 0:
            report(step)


if __name__ == "__main__":
    from by_hand import train_by_hand

    train_by_hand(train)
