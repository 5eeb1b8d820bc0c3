"""The shipped studies: their files are valid, and their trainings do what they say."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest

from normtune.run import Run, load_train
from normtune.study import load_study

STUDIES = Path(__file__).parent.parent / "studies"
NAMES = sorted(path.stem for path in STUDIES.glob("*.yaml"))
DATA = {
    "diabetes": "sklearn",
    "digits": "sklearn",
    "digits_rows": "sklearn",
    "randhie": "statsmodels",
    "vowels": "aeon",
}


def skip_without_data(name):
    package = DATA.get(name, "torch")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the data of {name} come with {package}")


@pytest.fixture(params=NAMES)
def study(request, monkeypatch):
    monkeypatch.setattr("sys.path", list(sys.path))
    skip_without_data(request.param)
    return load_study(STUDIES / f"{request.param}.yaml")


def trained(study, seed: int, fraction: float = 0.1, **how) -> Run:
    run = Run(seed=seed, params=study.config.params, fraction=fraction, **how)
    load_train(study.config.train, study.folder)(run)
    return run


def test_there_are_eight_studies():
    """Each study has a file of settings and a training."""
    assert len(NAMES) == 8
    assert all((STUDIES / f"{name}.py").is_file() for name in NAMES)


def test_a_study_reports_and_records(study):
    """A tenth of the schedule reports several values and records its norms."""
    run = trained(study, 0)
    assert len(run.values) >= 8
    assert all(math.isfinite(value) for _, value in run.values)
    assert len(run.recorder.record) >= 0.1 * study.config.params["steps"] - 1


def test_a_study_follows_its_seed(study):
    """One seed gives the same run bit for bit, and another seed another run."""
    first, again, other = (trained(study, seed, 0.05).recorder.record for seed in (0, 0, 1))
    assert first.norms.tobytes() == again.norms.tobytes()
    assert first.norms[0] != other.norms[0]


def test_a_study_obeys_its_max_norm(study):
    """A max_norm far below all norms leaves another model than no clipping."""
    free, held = trained(study, 0, 0.05), trained(study, 0, 0.05, max_norm=1e-4)
    assert free.values[0] == held.values[0]
    assert free.values[-1] != held.values[-1]


def test_parameters_in_the_file_are_those_of_the_script(study):
    """The script run by hand trains what the study trains."""
    train = load_train(study.config.train, study.folder)
    assert train.__globals__["DEFAULTS"] == study.config.params


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_study_is_a_plain_script(name):
    """Each training also runs by itself and prints its validation loss."""
    skip_without_data(name)
    command = [sys.executable, STUDIES / f"{name}.py"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert output.stdout.count("validation loss") == 9
