"""Which of nine speakers said a vowel: an LSTM on sequences of differing length, with SGD.

The data (JapaneseVowels, UCI) lie as text in the wheel of aeon, which is only read and never
imported: `pip install --no-deps aeon` is enough.
"""

import functools
import importlib.util
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

BATCH = 30
DEFAULTS = {"optimizer": "SGD", "lr": 3.0, "steps": 400, "hidden": 32}


class Speaker(nn.Module):
    """Utterances and their lengths in, logits of the nine speakers out."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, hidden, batch_first=True)
        self.out = nn.Linear(hidden, 9)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Logits of shape (batch, 9) for padded utterances of shape (batch, length, 12)."""
        states = self.lstm(x)[0]
        return self.out(states[torch.arange(len(x), device=x.device), lengths - 1])


@functools.cache
def read(part: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Padded utterances, their lengths and their speakers, of TRAIN or TEST."""
    package = importlib.util.find_spec("aeon")
    if package is None or package.origin is None:
        message = "this study reads its data from the wheel of aeon: pip install --no-deps aeon"
        raise ModuleNotFoundError(message, name="aeon")
    folder = Path(package.origin).parent / "datasets" / "data" / "JapaneseVowels"
    lines = (folder / f"JapaneseVowels_{part}.ts").read_text(encoding="utf-8").splitlines()
    utterances, speakers = [], []
    for line in lines[lines.index("@data") + 1 :]:
        *channels, speaker = line.split(":")
        rows = [[float(number) for number in channel.split(",")] for channel in channels]
        utterances.append(torch.tensor(rows).T)
        speakers.append(int(speaker) - 1)
    lengths = torch.tensor([len(utterance) for utterance in utterances])
    return pad_sequence(utterances, batch_first=True), lengths, torch.tensor(speakers)


def train(run) -> None:  # noqa: ANN001 - a normtune Run, or anything that looks like one
    """Train on one seed and report the validation loss, first that of the untrained model."""
    params = DEFAULTS | run.params
    steps = round(params["steps"] * run.fraction)
    x, lengths, y = (tensor.to(run.device) for tensor in read("TRAIN"))
    validation_x, validation_lengths, validation_y = (t.to(run.device) for t in read("TEST"))

    torch.manual_seed(run.seed)
    batches = torch.Generator().manual_seed(run.seed)
    model = Speaker(params["hidden"]).to(run.device)
    optimizer = getattr(torch.optim, params["optimizer"])(model.parameters(), lr=params["lr"])
    run.watch(optimizer)

    def report(step: int) -> None:
        with torch.no_grad():
            logits = model(validation_x, validation_lengths)
            run.report(cross_entropy(logits, validation_y).item(), step)

    report(0)
    for step in range(1, steps + 1):
        batch = torch.randint(len(x), (BATCH,), generator=batches).to(run.device)
        loss = cross_entropy(model(x[batch], lengths[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (steps // 8) == 0:
            report(step)


if __name__ == "__main__":
    from by_hand import train_by_hand

    train_by_hand(train)
