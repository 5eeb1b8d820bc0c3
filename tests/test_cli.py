"""The command line: what it prints, its exit codes, and one clear line for everything wrong."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from normtune.cli import app
from normtune.recorder import NormRecorder
from normtune.records import RecordWriter, dumps, header, row


def normtune(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)


def csv(norms, column="grad_norm"):
    return f"step,{column}\n" + "".join(f"{i},{x}\n" for i, x in enumerate(norms, 1))


@pytest.fixture
def record(tmp_path):
    """A record of 200 sound norms."""
    path = tmp_path / "run.norms.jsonl"
    norms = np.random.default_rng(0).lognormal(size=200)
    writer = RecordWriter(path)
    writer.write([dumps(header(optimizer="SGD", lr=0.1))])
    writer.write([row(i, float(x)) for i, x in enumerate(norms, 1)])
    writer.close()
    return path


def test_suggest_prints_the_table_and_ends_with_zero(record):
    """The number that is pasted is the one that the API gives."""
    from normtune import suggest

    done = normtune("suggest", record)
    assert done.exit_code == 0
    assert f"max_norm={suggest(record).max_norm:g}" in done.stdout
    assert "<- suggested" in done.stdout


def test_suggest_json_is_strict_and_holds_the_same_number(record):
    """No NaN, no Infinity: any JSON reader accepts it."""
    from normtune import suggest

    def refuse(name):
        raise AssertionError(name)

    found = json.loads(normtune("suggest", record, "--json").stdout, parse_constant=refuse)
    assert found["max_norm"] == suggest(record).max_norm


def test_suggest_reads_standard_input(record):
    """`-` stands for a pipe."""
    done = normtune("suggest", "-", stdin=record.read_bytes())
    assert done.exit_code == 0
    assert "suggested max_norm" in done.stdout


def test_suggest_takes_a_column_by_its_key(tmp_path):
    """A CSV whose norm column has a name of its own."""
    log = tmp_path / "log.csv"
    log.write_text(csv(np.random.default_rng(0).lognormal(size=100), "my_size"))
    assert normtune("suggest", log, "--key", "my_size").exit_code == 0
    refused = normtune("suggest", log)
    assert refused.exit_code == 1
    assert "--key" in refused.stderr


def test_suggest_takes_the_current_value_as_a_row(record):
    """The user's own max_norm is shown with what it does."""
    assert "current" in normtune("suggest", record, "--current", "0.2").stdout


def test_suggest_draws_to_a_file(record, tmp_path):
    """--plot writes a picture."""
    picture = tmp_path / "norms.svg"
    assert normtune("suggest", record, "--plot", picture).exit_code == 0
    assert picture.read_text().startswith("<?xml")


def test_list_shows_every_series(tmp_path):
    """--list names what can be taken."""
    log = tmp_path / "log.csv"
    log.write_text(csv(range(1, 60)))
    done = normtune("suggest", log, "--list")
    assert "grad_norm" in done.stdout
    assert "59 points" in done.stdout


SOUND = np.random.default_rng(0).lognormal(size=100).tolist()

BAD_FILES = {
    "empty": (b"", "empty"),
    "binary": (bytes(range(256)) * 40, ""),
    "no norm column": (b"step,loss\n1,2\n2,3\n", "norm"),
    "strings where numbers belong": (csv(["high"] * 50).encode(), ""),
    "all zero": (csv([0.0] * 50).encode(), "all 50 are 0"),
    "all non-finite": (csv(["nan"] * 50).encode(), "finite"),
    "fewer than 30 steps": (csv(SOUND[:29]).encode(), "30"),
    "already clipped": (csv([min(x, 0.5) for x in SOUND * 3]).encode(), "clipped"),
    "a truncated record": (b'{"normtune": 1, "attempt": "a"}\n{"step": 1, "nor', "step"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_gets_one_clear_line_and_exit_code_1(name, tmp_path):
    """Never a traceback, never a number."""
    content, word = BAD_FILES[name]
    file = tmp_path / "norms.csv"
    file.write_bytes(content)
    done = normtune("suggest", file)
    assert done.exit_code == 1, done.output
    assert done.stderr.startswith("normtune: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert word in done.stderr
    assert "suggested" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--rule", "p0.9"], "90"),
        (["--rule", "best"], "best"),
        (["--rule", "p101"], "101"),
        (["--skip", "-3"], "-3"),
        (["--skip", "many"], "many"),
        (["--current", "0"], "0"),
        (["--current", "nan"], "nan"),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else "",
)
def test_a_wrong_argument_gets_one_clear_line_and_exit_code_2(arguments, word, record):
    """The line says what came."""
    done = normtune("suggest", record, *arguments)
    assert done.exit_code == 2, done.output
    assert word in done.stderr
    assert "Traceback" not in done.output


def test_a_missing_file_gets_one_clear_line():
    """Its name is in it."""
    done = normtune("suggest", "nowhere.jsonl")
    assert done.exit_code == 1
    assert "nowhere.jsonl" in done.stderr


BAD_STUDIES = {
    "unknown key": ("train: t.py:train\nwarmup: 3\n", "warmup"),
    "wrong type": ("train: t.py:train\nwarmup_steps: many\n", "warmup_steps"),
    "a tab": ("train: t.py:train\n\twarmup_steps: 3\n", "tab"),
    "alias bomb": (
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\ntrain: t.py:train\n",
        "alias",
    ),
    "no such module": ("train: nowhere.py:train\n", "nowhere.py"),
}


@pytest.mark.parametrize("name", BAD_STUDIES)
@pytest.mark.parametrize("command", ["record", "search"])
def test_a_bad_study_file_gets_one_clear_line(name, command, tmp_path):
    """The line names the place."""
    text, word = BAD_STUDIES[name]
    study = tmp_path / "study.yaml"
    study.write_text(text)
    done = normtune(command, study)
    assert done.exit_code == 1, done.output
    assert word in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_control_characters_never_reach_the_terminal(tmp_path):
    """A name from a log could steer it (row 103)."""
    log = tmp_path / "log.csv"
    log.write_text("step,\x1b[31mgrad_norm\n" + "".join(f"{i},{i}\n" for i in range(1, 50)))
    done = normtune("suggest", log, "--list")
    assert "\x1b" not in done.output


def test_an_ascii_terminal_and_a_closed_pipe_end_quietly(record):
    """No UnicodeEncodeError, no BrokenPipeError (row 79)."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    command = [sys.executable, "-m", "normtune", "suggest", str(record)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0
    shell = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$@" | head -1', "-", *command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in shell.stderr
    assert "Error" not in shell.stderr


def test_the_version_is_printed():
    """--version."""
    from normtune import __version__

    assert normtune("--version").stdout.strip() == f"normtune {__version__}"


def test_a_recorder_file_is_a_source(tmp_path):
    """What NormRecorder writes, suggest reads."""
    import torch

    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([p], lr=0.0)
    with NormRecorder(optimizer, tmp_path / "a.norms.jsonl"):
        for i in range(40):
            optimizer.zero_grad()
            (p * (1.0 + (7 * i) % 40)).sum().backward()
            optimizer.step()
    assert normtune("suggest", tmp_path / "a.norms.jsonl").exit_code == 0
