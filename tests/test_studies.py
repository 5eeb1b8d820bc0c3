"""The shipped studies: their files are valid, and their trainings do what they say."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from normtune.run import Run, load_train
from normtune.study import load_study

STUDIES = Path(__file__).parent.parent / "studies"
NAMES = sorted(path.stem for path in STUDIES.glob("*.yaml"))


@pytest.fixture(params=NAMES)
def study(request, monkeypatch):
    monkeypatch.setattr("sys.path", list(sys.path))
    if request.param == "digits":
        pytest.importorskip("sklearn")
    return load_study(STUDIES / f"{request.param}.yaml")


def trained(study, seed: int, fraction: float = 0.1, **how) -> Run:
    run = Run(seed=seed, params=study.config.params, fraction=fraction, **how)
    load_train(study.config.train, study.folder)(run)
    return run


def test_a_study_reports_and_records(study):
    """A tenth of the schedule reports several values and records its norms."""
    run = trained(study, 0)
    assert len(run.values) >= 8
    assert all(math.isfinite(value) for _, value in run.values)
    assert len(run.recorder.record) >= 0.1 * study.config.params["steps"] - 1


def test_a_study_follows_its_seed(study):
    """One seed gives the same run bit for bit, and another seed another run."""
    first, again, other = (trained(study, seed).recorder.record for seed in (0, 0, 1))
    assert first.norms.tobytes() == again.norms.tobytes()
    assert first.norms[0] != other.norms[0]


def test_parameters_in_the_file_are_those_of_the_script(study):
    """The script run by hand trains what the study trains."""
    train = load_train(study.config.train, study.folder)
    assert train.__globals__["DEFAULTS"] == study.config.params


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_study_is_a_plain_script(name):
    """Each training also runs by itself and prints its validation loss."""
    command = [sys.executable, STUDIES / f"{name}.py"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert output.stdout.count("validation loss") == 9
