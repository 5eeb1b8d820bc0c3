"""Trains in a process that multiprocessing forks, with workers that load its data."""

import multiprocessing

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def train():
    torch.manual_seed(0)
    x = torch.randn(140, 8)
    model = nn.Linear(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = DataLoader(TensorDataset(x), batch_size=4, num_workers=1)
    for (batch,) in loader:
        optimizer.zero_grad()
        model(batch).pow(2).mean().backward()
        optimizer.step()


if __name__ == "__main__":
    child = multiprocessing.get_context("fork").Process(target=train)
    child.start()
    child.join()
    for _ in range(2):  # two models one after the other, in the parent
        train()
