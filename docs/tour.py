# %% [markdown]
# # A tour of normtune
#
# *People use 1 or 10 as `max_norm` in `clip_grad_norm_`. How do I set mine?*
#
# This notebook is made by `python docs/make_notebook.py` from `docs/tour.py`; its outputs are real.
#
# ## Record your own loop
#
# One line, the recorder, and nothing else changes.

# %%
import torch

import normtune

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
recorder = normtune.NormRecorder(optimizer)

for _ in range(400):
    x = torch.randn(16, 8)
    y = x.sum(1, keepdim=True) + torch.distributions.StudentT(1.5).sample((16, 1))
    torch.nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()

recorder.record

# %% [markdown]
# The targets have heavy tails, so a few batches have gradients that are far larger than the rest.
# The suggestion is a percentile of the recorded norms, with what speaks against it:

# %%
suggestion = recorder.suggest()
suggestion

# %%
suggestion.plot()
# %% [markdown]
# ## What each `max_norm` would do
#
# Under SGD clipping is a learning rate that is lowered for the big gradients only. The solid line
# says by how much on average, the dashed one how many steps are clipped.

# %%
from matplotlib import pyplot as plt

from normtune import plots

figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
plots.plot_effect(suggestion, ax)
# %% [markdown]
# ## From the log of a run that is over
#
# A record, `trainer_state.json`, `metrics.csv`, console output, a TensorBoard folder: here the
# record of a character LSTM that ships with normtune. The doubts matter as much as the number.

# %%
normtune.suggest("studies/results/char_lm.norms.jsonl")

# %% [markdown]
# ## Does it help on validation loss?
#
# A study answers that: no clipping, the suggestion, other values and lower learning rates, on one
# seed first and then the best of them on fresh paired seeds. 12 short trainings of a small network
# on handwritten digits; `normtune search studies/digits.yaml` does the same.

# %% slow
import shutil
import tempfile
from pathlib import Path

from normtune.search import search

folder = Path(tempfile.mkdtemp())
for name in ("digits.py", "digits.yaml"):
    shutil.copy(f"studies/{name}", folder)
result = search(folder / "digits.yaml", max_runs=12, jobs=1)
result

# %% slow
result.plot()

# %% [markdown]
# `normtune report digits.yaml` makes one page of it that can be sent to a colleague, and
# `normtune.load_result("digits.yaml")` reads a finished study back without any training.
