"""A training script of the usual kind: arguments, its own clipping, a line of log a few steps."""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--lr", type=float, default=0.05)
parser.add_argument("--clip", type=float, default=0.5, help="0 switches clipping off")
parser.add_argument("--optimizer", default="SGD")
parser.add_argument("--truth", help="write the gradient norm of every step to this file")
parser.add_argument("--save", help="write the trained parameters to this file")
parser.add_argument("--fail-at", type=int, default=-1)
args = parser.parse_args()

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
optimizer = getattr(torch.optim, args.optimizer)(model.parameters(), lr=args.lr)
norms = []
for step in range(args.steps):
    x = torch.randn(32, 8)
    y = torch.stack([x.sum(1), 3 * x[:, 0]], dim=1)
    optimizer.zero_grad()
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
    if args.clip > 0:
        clip_grad_norm_(model.parameters(), args.clip)
    optimizer.step()
    if step == args.fail_at:
        sys.exit(7)
    if step % 20 == 0:
        print(f"step {step} loss {loss.item():.4f}", flush=True)

if args.truth:
    Path(args.truth).write_text("".join(f"{norm}\n" for norm in norms))
if args.save:
    torch.save(model.state_dict(), args.save)
print("done")
