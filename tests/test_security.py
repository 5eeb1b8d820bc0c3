"""What a study, a log or a name could do to its reader: nothing."""

import ast
import io
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from normtune import cli
from normtune.search import Progress

HOUSE = Path(__file__).parent.parent / "normtune"
RUNS_CODE = {
    "pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "eval", "exec", "compile",
    "torch.load", "np.load", "pd.read_pickle", "yaml.unsafe_load", "yaml.full_load", "os.system",
    "os.popen", "subprocess.getoutput",
}  # fmt: skip


def risks(source):
    """What of a module could run what it reads: modules, calls, and shells."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & RUNS_CODE
        if isinstance(node, ast.ImportFrom):
            yield from {node.module} & RUNS_CODE
        if isinstance(node, ast.Call):
            yield from {ast.unparse(node.func)} & RUNS_CODE
            yield from [k.arg for k in node.keywords if k.arg == "shell"]


@pytest.mark.parametrize("file", sorted(HOUSE.rglob("*.py")), ids=lambda f: f.name)
def test_nothing_that_is_read_is_run(file):
    """Rows 97 and 98: no pickle, no torch.load, no eval, and never a shell."""
    assert list(risks(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source", ["import pickle", "torch.load(f)", "subprocess.run(x, shell=True)", "eval(x)"]
)
def test_a_module_that_would_run_what_it_reads_is_noticed(source):
    """The guard above can fail."""
    assert list(risks(source))


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:secret@nowhere.invalid/db",
        "mysql://u@h/db?password=secret",
        "x://u:secret@h",
    ],
)
def test_a_storage_that_fails_never_shows_its_password(tmp_path, url):
    """Row 99: neither from the option nor from the environment, in no text of the command line."""
    (tmp_path / "s.yaml").write_text("train: t.py:train\n")
    (tmp_path / "t.py").write_text("def train(run): ...\n")
    arguments = ["search", str(tmp_path / "s.yaml")]
    for how in (
        {"args": [*arguments, "--storage", url]},
        {"args": arguments, "env": {"NORMTUNE_STORAGE": url}},
    ):
        done = CliRunner().invoke(cli.app, **how)
        assert done.exit_code == 1
        assert "secret" not in done.output


def test_no_traceback_shows_local_variables():
    """Row 100: older typer would print them, passwords among them."""
    assert cli.app.pretty_exceptions_show_locals is False
    assert cli.app.pretty_exceptions_enable is False


class Terminal(io.StringIO):
    """A standard error that says that it is a terminal."""

    def isatty(self):
        return True


def test_names_reach_the_progress_of_a_terminal_as_they_are(monkeypatch):
    """Row 102: brackets are no markup; beside them stands what is left of the time."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "160")
    name = "layer [/red] w[gate]"
    with cli._search_progress(quiet=False) as show:
        show(Progress("started", name, 0, 4, 1))
        show(Progress("note", name, 0, 4, 1))
        show(Progress("output", f"\x1b[31m{name}\x07", 0, 4, 1))
        show(Progress("finished", "done", 1, 4, 0, 300.0))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert shown.count(name) >= 3
    assert "5 min left at most" in shown
    assert "\x07" not in shown
