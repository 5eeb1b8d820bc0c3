"""`normtune report` and `--plot`, from a record, a log and a study; and a study read back."""

import json
import os
import pty
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import pytest
from finished_study import NORMS, write_finished, write_record
from small_study import write_study
from test_cli import normtune

from normtune import records, reports
from normtune.errors import NormtuneError, StudyError
from normtune.reports import Asked, content_of
from normtune.search import search
from normtune.stored import load_result, load_suggestion
from normtune.suggestion import suggest

plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_finished(tmp_path_factory.mktemp("study"))


@pytest.fixture
def record(tmp_path):
    return write_record(tmp_path / "run.norms.jsonl")


def test_what_a_search_found_can_be_read_back(tmp_path):
    """Verdict, trials, settings and notes are those that the search gave, without training."""
    path = write_study(tmp_path, search="{max_runs: 4}")
    found = search(path)
    again = load_result(path)
    assert again.to_dict() == found.to_dict()
    assert str(again) == str(found)
    suggestion = load_suggestion(path)
    assert suggestion.max_norm == found.settings.suggestion
    assert len(suggestion.record) == 40


def test_without_its_record_a_study_is_still_reported(study, tmp_path):
    """Runs may be cleaned away; the storage keeps the verdict and the suggestion."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("s.yaml", "t.py", "s.db"):
        (copy / name).write_bytes((study.parent / name).read_bytes())
    assert load_suggestion(copy / "s.yaml") is None
    done = normtune("report", copy / "s.yaml", "--format", "text")
    assert done.exit_code == 0, done.output
    assert load_result(study).verdict.sentence[:40] in done.stdout
    assert "Candidates" not in done.stdout


def test_a_study_that_was_not_searched_is_refused(tmp_path):
    """The line says what to run, and no storage is made by asking."""
    path = write_study(tmp_path)
    with pytest.raises(StudyError, match="normtune search"):
        load_result(path)
    done = normtune("report", path)
    assert done.exit_code == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "s.db").exists()


def test_a_report_is_written_to_a_file(record, tmp_path):
    """The page holds the number; nothing else is left in the folder."""
    page = tmp_path / "out" / "report.md"
    page.parent.mkdir()
    done = normtune("report", record, "-o", page)
    assert done.exit_code == 0, done.output
    assert str(page) in done.stdout
    text = page.read_text(encoding="utf-8")
    assert rf"suggested max\_norm {suggest(NORMS).max_norm:g}" in text
    assert [p.name for p in page.parent.iterdir()] == ["report.md"]


@contextmanager
def room_for(n):
    """No file can grow beyond `n` bytes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_report_for_which_there_is_no_room_leaves_the_old_one_whole(tmp_path):
    """It is written beside the old one and takes its place at once, or not at all (row 74)."""
    page = tmp_path / "report.html"
    page.write_text("the old one")
    with room_for(1000), pytest.raises(NormtuneError, match=r"cannot write the report .*too large"):
        reports.write("x" * 5000, page)
    assert page.read_text() == "the old one"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    reports.write("x" * 5000, page)
    assert len(page.read_text()) == 5000


def test_a_page_without_a_file_is_report_html(record, tmp_path, monkeypatch):
    """HTML is never printed to a terminal."""
    monkeypatch.chdir(tmp_path)
    assert normtune("report", record.name).exit_code == 0
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("name", "start"), [("a.md", "# max"), ("a.txt", "max_norm for"), ("a.json", "{")]
)
def test_the_form_follows_the_file(name, start, record, tmp_path):
    """--format is needed only where the ending does not say it."""
    assert normtune("report", record, "-o", tmp_path / name).exit_code == 0
    assert (tmp_path / name).read_text(encoding="utf-8").startswith(start)


def test_json_is_the_result(study):
    """What a script reads."""
    done = normtune("report", study, "--format", "json")
    found = json.loads(done.stdout)
    assert found["result"] == json.loads(json.dumps(load_result(study).to_dict()))


def test_the_command_of_a_report_makes_it_again(record, tmp_path, monkeypatch):
    """Typed as it stands in the report, it gives the same report."""
    monkeypatch.chdir(tmp_path)
    options = ["--rule", "p75", "--skip", "10", "--current", "0.5", "--format", "json"]
    first = normtune("report", record.name, *options).stdout
    command = json.loads(first)["command"].split()
    assert command[:3] == ["normtune", "report", record.name]
    assert normtune(*command[1:]).stdout == first


@pytest.mark.filterwarnings("ignore:Query string argument")
def test_a_password_never_reaches_a_report(study, tmp_path):
    """Neither the storage's line nor the command shows it."""
    url = f"sqlite:///{study.parent}/s.db?password=geheim"
    for form in ("text", "json"):
        done = normtune("report", study, "--format", form, "--storage", url)
        assert done.exit_code == 0, done.output
        assert "geheim" not in done.output
        assert "s.db" in done.output


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["--format", "pdf"], 2, "html"),
        (["--rule", "p0.9"], 2, "90"),
        (["--storage", "sqlite:///a.db", "--format", "text"], 2, "study file"),
        (["-o", "nowhere/a.html"], 1, "nowhere"),
        (["--series", "other"], 1, "other"),
    ],
)
def test_a_wrong_argument_gets_one_clear_line(arguments, code, word, record):
    """The line says what came."""
    done = normtune("report", record, *arguments)
    assert done.exit_code == code, done.output
    assert word in done.output
    assert "Traceback" not in done.output


def test_a_study_names_its_own_rule(study):
    """Options for norms are refused there."""
    done = normtune("report", study, "--rule", "p75")
    assert done.exit_code == 2
    assert "rule" in done.stderr


def test_a_report_never_overwrites_its_source(record):
    """Neither the record nor a study file is lost to a wrong -o."""
    before = record.read_bytes()
    assert normtune("report", record, "-o", record).exit_code == 2
    assert record.read_bytes() == before


def test_earlier_starts_of_a_run_are_read_one_by_one(record):
    """A file with two starts gives both, each with its own steps."""
    write_record(record, norms=NORMS[:50] * 2)
    first, second = records.starts(record)
    np.testing.assert_array_equal(first.norms, NORMS)
    np.testing.assert_array_equal(second.norms, NORMS[:50] * 2)
    picture = content_of(str(record)).sections[0].pictures[0]
    (earlier,) = picture.draw.keywords["earlier"]
    np.testing.assert_array_equal(earlier.norms, NORMS)


def test_options_that_were_not_given_are_not_in_the_command():
    """Only what differs from the defaults."""
    assert Asked().given == {}
    assert Asked(rule="p75").given == {"rule": "p75"}
    assert set(asdict(Asked())) >= {"storage", "series", "attempt"}


def test_search_draws_its_runs(study, tmp_path):
    """--plot writes a picture of a search that is over, and refuses a wrong file at once."""
    picture = tmp_path / "runs.svg"
    ended = write_study(tmp_path)
    done = normtune("search", ended, "--yes", "--plot", tmp_path / "runs.docx")
    assert done.exit_code == 1
    assert not (tmp_path / "s.db").exists()
    figure = load_result(study).plot().get_figure(root=True)
    figure.savefig(picture)
    plt.close(figure)
    assert "validation value" in picture.read_text(encoding="utf-8")


def test_a_study_gets_its_verdict_and_the_pictures_of_its_norms_without_torch(record, study):
    """Losses, and the norms behind the suggestion; neither torch nor pandas is loaded."""
    probe = (
        "import sys; from normtune.cli import app\n"
        "for source in sys.argv[2:]:\n"
        "    app(['report', source, '-o', sys.argv[1]], standalone_mode=False)\n"
        "print([m for m in ('torch', 'pandas', 'scipy.stats') if m in sys.modules])"
    )
    files = (record.with_name("a.html"), record, study)
    command = [sys.executable, "-c", probe, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    text = files[0].read_text(encoding="utf-8")
    assert text.count("<svg") == 4
    assert "a note of the search" in text
    assert len(text) < 1_000_000


def on_a_terminal(columns, *arguments, encoding="utf-8"):
    """What the command prints to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "normtune", *map(str, arguments)]
    child = subprocess.Popen(command, stdout=theirs, env=environment)
    os.close(theirs)
    printed = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:
            break
        if not chunk:
            break
        printed += chunk
    os.close(ours)
    assert child.wait(timeout=60) == 0
    return printed.decode(encoding)


def test_suggest_draws_a_small_plot_on_a_wide_terminal(record):
    """Norms as dots and the suggestion as a line; no line is wider than the terminal."""
    printed = on_a_terminal(100, "suggest", record)
    assert any(0x2800 < ord(c) < 0x2900 for c in printed)
    assert "<- suggested" in printed.split("suggested max_norm")[0]
    plot = printed.split("suggested max_norm")[0].splitlines()
    assert max(map(len, plot)) <= 100


@pytest.mark.parametrize(("columns", "encoding"), [(60, "utf-8"), (100, "ascii")])
def test_a_narrow_or_plain_terminal_gets_no_plot(columns, encoding, record):
    """The text is what it always is."""
    printed = on_a_terminal(columns, "suggest", record, encoding=encoding)
    assert printed.startswith("suggested max_norm")
