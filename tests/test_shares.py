"""Which parameters carry the largest norms."""

import dataclasses

import numpy as np
import pytest
import torch

from normtune import NormRecord, NormRecorder, suggest
from normtune.shares import largest_shares


def record_of(parts):
    total = np.sqrt(sum(v**2 for v in parts.values()))
    return dataclasses.replace(NormRecord.of(total), groups=parts)


def test_the_parameter_behind_the_spikes_is_named_first():
    """It carries little on most steps and nearly all on the top 1 %."""
    rng = np.random.default_rng(0)
    calm, wild = rng.uniform(1, 2, 500), rng.uniform(0.1, 0.2, 500)
    wild[[70, 210, 333, 400, 480]] = 40.0
    first, *_ = largest_shares(record_of({"calm": calm, "rnn.weight_hh_l0": wild}))
    top = wild > 30
    assert first.name == "rnn.weight_hh_l0"
    expected = wild[top] ** 2 / (wild[top] ** 2 + calm[top] ** 2)
    assert first.top == pytest.approx(expected.mean())
    assert first.all < 0.1


def test_without_groups_there_is_nothing_to_name():
    """A record of totals alone."""
    assert largest_shares(NormRecord.of([1.0, 2.0])) == ()


def test_a_real_training_names_its_layer():
    """groups=model records the norm of each parameter; suggest prints the largest."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with NormRecorder(optimizer, groups=model) as recorder:
        for _ in range(60):
            optimizer.zero_grad()
            (model(torch.randn(8, 4)) ** 2).mean().backward()
            optimizer.step()
        suggestion = recorder.suggest()
    names = {name for name, _ in model.named_parameters()}
    assert {share.name for share in suggestion.shares} <= names
    assert f"from {suggestion.shares[0].name}" in str(suggestion)
    assert suggest(recorder.record).shares == suggestion.shares
