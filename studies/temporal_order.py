"""Which of two symbols came first, far back in a sequence: a tanh RNN with SGD.

Gradients explode through time here (Pascanu et al. 2013, arXiv:1211.5063, section 4.1): without
clipping a single step can undo all that was learned. The sequences are made, not loaded.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

LENGTH = 20  # symbols in one sequence
SYMBOLS = 6  # four that mean nothing, then the two whose order is asked
BATCH = 32
DEFAULTS = {"optimizer": "SGD", "lr": 0.1, "steps": 800, "hidden": 40}


class Order(nn.Module):
    """Symbols in, logits of the four orders (XX, XY, YX, YY) out."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.rnn = nn.RNN(SYMBOLS, hidden, batch_first=True)
        nn.init.orthogonal_(self.rnn.weight_hh_l0)  # else it takes ten times as many steps
        self.out = nn.Linear(hidden, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of shape (batch, 4) for symbols of shape (batch, length)."""
        return self.out(self.rnn(one_hot(x, SYMBOLS).float())[0][:, -1])


def draw(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """`n` sequences and their classes."""
    x = torch.randint(SYMBOLS - 2, (n, LENGTH), generator=generator)
    order = torch.randint(2, (n, 2), generator=generator)
    tenth = LENGTH // 10
    first = torch.randint(tenth, 2 * tenth, (n,), generator=generator)
    second = torch.randint(4 * tenth, 5 * tenth, (n,), generator=generator)
    rows = torch.arange(n)
    x[rows, first] = SYMBOLS - 2 + order[:, 0]
    x[rows, second] = SYMBOLS - 2 + order[:, 1]
    return x, 2 * order[:, 0] + order[:, 1]


def train(run) -> None:  # noqa: ANN001 - a normtune Run, or anything that looks like one
    """Train on one seed and report the validation loss, first that of the untrained model."""
    params = DEFAULTS | run.params
    steps = round(params["steps"] * run.fraction)
    x, y = (part.to(run.device) for part in draw(500, torch.Generator().manual_seed(12345)))

    torch.manual_seed(run.seed)
    batches = torch.Generator().manual_seed(run.seed)
    model = Order(params["hidden"]).to(run.device)
    optimizer = getattr(torch.optim, params["optimizer"])(model.parameters(), lr=params["lr"])
    run.watch(optimizer)

    def report(step: int) -> None:
        with torch.no_grad():
            run.report(cross_entropy(model(x), y).item(), step)

    report(0)
    for step in range(1, steps + 1):
        symbols, order = draw(BATCH, batches)
        loss = cross_entropy(model(symbols.to(run.device)), order.to(run.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (steps // 8) == 0:
            report(step)


if __name__ == "__main__":
    from by_hand import train_by_hand

    train_by_hand(train)
