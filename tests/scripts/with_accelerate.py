"""An Accelerate script with gradient accumulation."""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--truth")
args = parser.parse_args()
accelerator = Accelerator(gradient_accumulation_steps=3, cpu=True)
torch.manual_seed(0)
x = torch.randn(720, 8)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=2)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
norms = []
for a, b in loader:
    with accelerator.accumulate(model):
        accelerator.backward(((model(a) - b) ** 2).mean())
        if accelerator.sync_gradients:
            norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
if args.truth and accelerator.is_main_process:
    Path(args.truth).write_text("".join(f"{norm}\n" for norm in norms))
