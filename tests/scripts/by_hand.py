"""A language-model script of the old style: no optimizer object, the update by hand."""

import argparse
from pathlib import Path

import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--clip", type=float, default=0.25)
parser.add_argument("--truth")
args = parser.parse_args()

torch.manual_seed(0)
lr = 0.5
embed, rnn, decode = nn.Embedding(20, 8), nn.LSTM(8, 8), nn.Linear(8, 20)
model = nn.ModuleList([embed, rnn, decode])
norms = []
for _ in range(args.steps):
    text = torch.randint(0, 20, (7, 4))
    model.zero_grad()
    hidden, _ = rnn(embed(text[:-1]))
    loss = nn.functional.cross_entropy(decode(hidden).flatten(0, 1), text[1:].flatten())
    loss.backward()
    norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
    torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    for p in model.parameters():
        p.data.add_(p.grad, alpha=-lr)

if args.truth:
    Path(args.truth).write_text("".join(f"{norm}\n" for norm in norms))
