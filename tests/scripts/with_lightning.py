"""A Lightning script: module, data, Trainer with gradient_clip_val."""

import argparse
from pathlib import Path

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        self.norms = []

    def training_step(self, batch, _):
        x, y = batch
        return ((self.net(x) - y) ** 2).mean()

    def on_after_backward(self):
        self.norms.append(torch.cat([p.grad.flatten() for p in self.parameters()]).norm().item())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


parser = argparse.ArgumentParser()
parser.add_argument("--truth")
args = parser.parse_args()
lightning.seed_everything(0)
x = torch.randn(480, 8)
loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)
model = Net()
trainer = lightning.Trainer(
    max_epochs=1,
    accelerator="cpu",
    gradient_clip_val=0.5,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, loader)
if args.truth:
    Path(args.truth).write_text("".join(f"{norm}\n" for norm in model.norms))
