"""A small transformer on the Python documentation, its layer norms last (post-LN), with AdamW.

Post-LN transformers need a learning-rate warm-up or clipping at high rates (Xiong et al. 2020,
arXiv:2002.04745); there is no warm-up here. The text is that of Python's own `help()`, so nothing
is downloaded; it differs between Python versions, and every record keeps its hash.
"""

import functools
import hashlib
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.nn.functional import cross_entropy

TEXT = "\n".join(topics[name] for name in sorted(topics))
LENGTH = 32  # characters in one training example
BATCH = 16
DEFAULTS = {"optimizer": "AdamW", "lr": 0.01, "steps": 240, "width": 32, "layers": 2}


class PostLN(nn.Module):
    """Characters in, logits of the next character out."""

    def __init__(self, symbols: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.position = nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers)
        self.out = nn.Linear(width, symbols)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of shape (batch, length, symbols) for characters of shape (batch, length)."""
        positions = torch.arange(x.shape[1], device=x.device)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        hidden = self.embedding(x) + self.position(positions)
        return self.out(self.layers(hidden, mask, is_causal=True))


@functools.cache
def load() -> tuple[torch.Tensor, torch.Tensor, int]:
    """Training characters, validation examples, and how many symbols there are."""
    symbols = sorted(set(TEXT))
    number = {symbol: i for i, symbol in enumerate(symbols)}
    data = torch.tensor([number[symbol] for symbol in TEXT])
    cut = len(data) * 9 // 10
    validation = data[cut : cut + 64 * (LENGTH + 1)].view(64, LENGTH + 1)
    return data[:cut], validation, len(symbols)


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next character, in nats."""
    return cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def train(run) -> None:  # noqa: ANN001 - a normtune Run, or anything that looks like one
    """Train on one seed and report the validation loss, first that of the untrained model."""
    params = DEFAULTS | run.params
    steps = round(params["steps"] * run.fraction)
    train_data, validation, symbols = load()
    train_data, validation = train_data.to(run.device), validation.to(run.device)

    torch.manual_seed(run.seed)
    batches = torch.Generator().manual_seed(run.seed)
    model = PostLN(symbols, params["width"], params["layers"]).to(run.device)
    optimizer = getattr(torch.optim, params["optimizer"])(model.parameters(), lr=params["lr"])
    run.watch(optimizer, metadata={"text": hashlib.sha256(TEXT.encode()).hexdigest()[:16]})

    def report(step: int) -> None:
        with torch.no_grad():
            run.report(loss_of(model, validation).item(), step)

    offsets = torch.arange(LENGTH + 1)
    report(0)
    for step in range(1, steps + 1):
        starts = torch.randint(len(train_data) - LENGTH, (BATCH, 1), generator=batches)
        loss = loss_of(model, train_data[(starts + offsets).to(run.device)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (steps // 8) == 0:
            report(step)


if __name__ == "__main__":
    from by_hand import train_by_hand

    train_by_hand(train)
