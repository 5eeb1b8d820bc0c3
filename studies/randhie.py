"""How often people see a doctor: Poisson regression by a small network, with SGD.

The counts of the RAND health insurance experiment (statsmodels) have a long tail, up to 77 visits,
and the model predicts the logarithm of the rate: one rare person can throw it off.
"""

import functools

import torch
from statsmodels.datasets import randhie
from torch import nn
from torch.nn.functional import poisson_nll_loss

BATCH = 64
DEFAULTS = {"optimizer": "SGD", "lr": 0.1, "steps": 800, "hidden": 32}


@functools.cache
def load() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training inputs and counts, then those for validation; the same split for every seed."""
    data = randhie.load_pandas().data
    x = data.drop(columns="mdvis")
    inputs = torch.tensor(((x - x.mean()) / x.std()).to_numpy(), dtype=torch.float32)
    counts = torch.tensor(data["mdvis"].to_numpy(), dtype=torch.float32)[:, None]
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    kept, held_out = order[:16000], order[16000:]
    return inputs[kept], counts[kept], inputs[held_out], counts[held_out]


def train(run) -> None:  # noqa: ANN001 - a normtune Run, or anything that looks like one
    """Train on one seed and report the validation loss, first that of the untrained model."""
    params = DEFAULTS | run.params
    steps = round(params["steps"] * run.fraction)
    x, y, validation_x, validation_y = (part.to(run.device) for part in load())

    torch.manual_seed(run.seed)
    batches = torch.Generator().manual_seed(run.seed)
    hidden = params["hidden"]
    model = nn.Sequential(
        nn.Linear(x.shape[1], hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 1),
    ).to(run.device)
    optimizer = getattr(torch.optim, params["optimizer"])(model.parameters(), lr=params["lr"])
    run.watch(optimizer)

    def report(step: int) -> None:
        with torch.no_grad():
            run.report(poisson_nll_loss(model(validation_x), validation_y).item(), step)

    report(0)
    for step in range(1, steps + 1):
        batch = torch.randint(len(x), (BATCH,), generator=batches).to(run.device)
        loss = poisson_nll_loss(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (steps // 8) == 0:
            report(step)


if __name__ == "__main__":
    from by_hand import train_by_hand

    train_by_hand(train)
