"""Handwritten digits by a small network on raw pixels, with SGD and momentum.

The pixels lie between 0 and 16 and are not scaled: at a rate that is too high the first steps kill
the network, and it stays at chance.
"""

import functools

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

BATCH = 32
DEFAULTS = {"optimizer": "SGD", "lr": 0.05, "steps": 800, "hidden": 64}


@functools.cache
def load() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images and labels, then those for validation; the same split for every seed."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32)
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
    hidden = params["hidden"]
    model = nn.Sequential(
        nn.Linear(64, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
    ).to(run.device)
    options = {"momentum": 0.9} if params["optimizer"] == "SGD" else {}
    make = getattr(torch.optim, params["optimizer"])
    optimizer = make(model.parameters(), lr=params["lr"], **options)
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
