"""The trainings of the sweep: each study with its optimizers and learning rates."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Configuration:
    """One study with one optimizer and learning rate.

    Attributes:
        study: The name of its file.
        optimizer: The class in torch.optim.
        lr: The learning rate.
        others: What else differs from the study's own parameters.
    """

    study: str
    optimizer: str
    lr: float
    others: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """Such as ``"digits SGD 0.05"``."""
        return f"{self.study} {self.optimizer} {self.lr:g}"

    @property
    def params(self) -> dict[str, Any]:
        """What the training gets as ``run.params``."""
        return {"optimizer": self.optimizer, "lr": self.lr} | self.others


# From low to too high, by unclipped runs of one seed; which of them is the best is read from the
# sweep itself. The digits' SGD has momentum 0.9.
RATES = {
    ("temporal_order", "SGD"): (0.01, 0.03, 0.1),
    ("temporal_order", "AdamW"): (0.01, 0.03),
    ("diabetes", "SGD"): (1e-5, 3e-5, 1e-3),
    ("diabetes", "AdamW"): (0.003, 0.03),
    ("randhie", "SGD"): (0.03, 0.1, 0.3),
    ("randhie", "AdamW"): (0.003, 0.1),
    ("digits", "SGD"): (0.003, 0.01, 0.05),
    ("digits", "AdamW"): (0.003, 0.03),
    ("digits_rows", "SGD"): (0.3, 1.0, 3.0),
    ("digits_rows", "AdamW"): (0.03, 0.1),
    ("vowels", "SGD"): (1.0, 3.0, 10.0),
    ("vowels", "AdamW"): (0.01, 0.03),
    ("transformer", "AdamW"): (0.003, 0.01, 0.03),
    ("transformer", "SGD"): (1.0, 2.0),
    ("char_lm", "SGD"): (3.0, 10.0, 30.0),
    ("char_lm", "AdamW"): (0.01, 0.03),
}
SMALLER = {"char_lm": {"steps": 240, "hidden": 64}}  # so that one run takes 2 seconds, not 5

CONFIGURATIONS = tuple(
    Configuration(study, optimizer, lr, SMALLER.get(study, {}))
    for (study, optimizer), rates in RATES.items()
    for lr in rates
)
