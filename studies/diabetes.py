"""How far a disease went in a year, from ten measurements: a small network on raw targets.

The targets lie between 25 and 346 and are not scaled, so the squared error and its gradients are
in the thousands: fixed limits such as 1.0 hold the training back.
"""

import functools

import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.nn.functional import mse_loss

BATCH = 32
DEFAULTS = {"optimizer": "SGD", "lr": 3e-4, "steps": 800, "hidden": 64}


@functools.cache
def load() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training inputs and targets, then those for validation; the same split for every seed."""
    x, y = load_diabetes(return_X_y=True)
    inputs = torch.tensor(x / x.std(axis=0), dtype=torch.float32)
    targets = torch.tensor(y, dtype=torch.float32)[:, None]
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    kept, held_out = order[:300], order[300:]
    return inputs[kept], targets[kept], inputs[held_out], targets[held_out]


def train(run) -> None:  # noqa: ANN001 - a normtune Run, or anything that looks like one
    """Train on one seed and report the validation loss, first that of the untrained model."""
    params = DEFAULTS | run.params
    steps = round(params["steps"] * run.fraction)
    x, y, validation_x, validation_y = (part.to(run.device) for part in load())

    torch.manual_seed(run.seed)
    batches = torch.Generator().manual_seed(run.seed)
    hidden = params["hidden"]
    model = nn.Sequential(
        nn.Linear(10, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 1),
    ).to(run.device)
    optimizer = getattr(torch.optim, params["optimizer"])(model.parameters(), lr=params["lr"])
    run.watch(optimizer)

    def report(step: int) -> None:
        with torch.no_grad():
            run.report(mse_loss(model(validation_x), validation_y).item(), step)

    report(0)
    for step in range(1, steps + 1):
        batch = torch.randint(len(x), (BATCH,), generator=batches).to(run.device)
        loss = mse_loss(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (steps // 8) == 0:
            report(step)


if __name__ == "__main__":
    from by_hand import train_by_hand

    train_by_hand(train)
