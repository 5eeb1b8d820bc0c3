"""A classifier of the style of PyTorch's MNIST example: no clipping, no seed, nothing of the kind."""

import random

import torch
from torch import nn

points = torch.randn(360, 6)
labels = (points[:, 0] * points[:, 1] > 0).long()
model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


def test():
    model.eval()
    with torch.no_grad():
        output = model(points[240:])
        loss = nn.functional.cross_entropy(output, labels[240:])
        correct = (output.argmax(1) == labels[240:]).sum().item()
    print(f"Test set: Average loss: {loss:.4f}, Accuracy: {correct}/120 ({correct / 1.2:.0f}%)\n")
    model.train()


for _ in range(4):
    rows = list(range(240))
    random.shuffle(rows)
    for i in range(0, 240, 16):
        batch = rows[i : i + 16]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(points[batch]), labels[batch]).backward()
        optimizer.step()
    test()
