"""A small recurrent language model with its own clipping, of the style of PyTorch's examples."""

import argparse
import math

import torch
from torch import nn

parser = argparse.ArgumentParser(description="LSTM language model")
parser.add_argument("--lr", type=float, default=2.0)
parser.add_argument("--clip", type=float, default=0.25, help="gradient clipping")
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--seed", type=int, default=1111)
args = parser.parse_args()

torch.manual_seed(args.seed)
text = torch.randint(0, 4, (1000,)).cumsum(0) % 12
train, val = text[:800].view(8, 100).t(), text[800:].view(4, 50).t()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.out = nn.Embedding(12, 8), nn.LSTM(8, 16), nn.Linear(16, 12)

    def forward(self, x):
        return self.out(self.rnn(self.embed(x))[0])


model = Model()
optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)


def loss_of(data, i, length=10):
    logits = model(data[i : i + length])
    return nn.functional.cross_entropy(logits.flatten(0, 1), data[i + 1 : i + length + 1].flatten())


@torch.no_grad()
def evaluate():
    return sum(loss_of(val, i).item() for i in range(0, 39, 10)) / 4


for epoch in range(args.epochs):
    for i in range(0, 89, 8):
        optimizer.zero_grad()
        loss = loss_of(train, i)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
    val_loss = evaluate()
    print(
        f"| end of epoch {epoch} | valid loss {val_loss:5.2f} | valid ppl {math.exp(val_loss):8.2f}"
    )
