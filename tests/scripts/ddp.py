"""Data-parallel training: under torchrun, or with --spawn N processes of its own."""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def train(rank, args):
    if args.spawn:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(args.spawn),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=args.port,
        )
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(rank)
    norms = []
    for _ in range(args.steps):
        x = torch.randn(16, 8)
        optimizer.zero_grad()
        ((model(x) - x[:, :2] * 3) ** 2).mean().backward()
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
        if args.clip > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
    if args.truth and rank == 0:
        Path(args.truth).write_text("".join(f"{norm}\n" for norm in norms))
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--clip", type=float, default=0.5)
    parser.add_argument("--spawn", type=int, default=0)
    parser.add_argument("--port", default="29511")
    parser.add_argument("--truth")
    arguments = parser.parse_args()
    if arguments.spawn:
        mp.spawn(train, (arguments,), nprocs=arguments.spawn)
    else:
        train(0, arguments)
