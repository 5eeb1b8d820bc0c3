"""Storage URLs: which one is taken, what is refused, and that no password is shown."""

import subprocess
import sys
from dataclasses import replace

import optuna
import pytest
from small_study import write_study
from typer.testing import CliRunner

from normtune import storages
from normtune.cli import app
from normtune.errors import StudyError
from normtune.study import load_study

# URL -> its password, as it stands there.
SECRETS = {
    "postgresql://u:secret@h/db": "secret",
    "postgresql+psycopg://u:secret@h:5432/db?sslmode=require": "secret",
    "mysql://u@h/db?password=secret": "secret",
    "postgresql://u:secret/with/slashes@h/db": "secret/with/slashes",
    "postgresql://u:sec?ret@h/db": "sec?ret",
    "postgresql://u:secret@with@ats@h/db": "secret@with@ats",
    "postgresql://u:secret:5@h:x/db": "secret:5",
}


@pytest.mark.parametrize(("url", "password"), SECRETS.items())
def test_no_password_in_any_text(url, password):
    """Row 99: in either place, and whatever characters it has."""
    shown = storages.masked(url)
    assert "sec" not in shown
    assert "ret" not in shown
    assert shown.startswith(url.partition("u")[0].partition(":")[0])
    assert "sec" not in storages.scrubbed(f"no answer from {url} to {password!r}", url)


@pytest.mark.parametrize("url", list(SECRETS)[-2:])
def test_a_password_that_a_driver_would_misread_is_refused(url):
    """Its parts would become host, port and database, which messages name."""
    with pytest.raises(StudyError, match="must be like") as caught:
        storages.opened(url)
    assert "secret" not in str(caught.value)


def test_the_flag_comes_first_then_the_file_then_the_environment(tmp_path, monkeypatch):
    """And without any of them a SQLite file beside the study file."""
    study = load_study(write_study(tmp_path / "s"))
    assert study.storage == f"sqlite:///{tmp_path}/s/s.db"
    monkeypatch.setenv("NORMTUNE_STORAGE", "postgresql://environment/db")
    assert study.storage == "postgresql://environment/db"
    search = study.config.search.model_copy(update={"storage": "postgresql://file/db"})
    named = replace(study, config=study.config.model_copy(update={"search": search}))
    assert named.storage == "postgresql://file/db"
    assert storages.chosen("postgresql://flag/db") == "postgresql://flag/db"


ALONE = {
    "the default": ({}, "is a SQLite file"),
    "a SQLite file": ({"NORMTUNE_STORAGE": "sqlite:///x.db"}, "sqlite:///"),
    "a journal file": ({"NORMTUNE_STORAGE": "journal.log"}, "journal.log is a journal file"),
}


@pytest.mark.parametrize("command", [["search", "--jobs", "0"], ["worker"]])
@pytest.mark.parametrize(("environment", "said"), ALONE.values(), ids=ALONE)
def test_files_are_refused_for_several_processes(tmp_path, command, environment, said):
    """Rows 90 and 91: the sentence says what to use, and what needs no server."""
    path = write_study(tmp_path / "s")
    done = CliRunner().invoke(app, [*command, str(path)], env=environment)
    assert done.exit_code == 1
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr
    assert "a PostgreSQL server by NORMTUNE_STORAGE=postgresql+psycopg://user:pass" in done.stderr
    assert "a single normtune search with --jobs N needs no server" in done.stderr
    assert sorted(file.name for file in path.parent.iterdir()) == ["s.yaml", "t.py"]


def test_a_journal_file_is_never_opened(tmp_path):
    """Row 91: one with a torn line stays as it is, instead of being appended to."""
    file = tmp_path / "journal.log"
    backend = optuna.storages.journal.JournalFileBackend(str(file))
    optuna.create_study(study_name="s", storage=optuna.storages.JournalStorage(backend))
    file.write_bytes(file.read_bytes() + b'{"op_code": 4, "wor')
    before = file.read_bytes()
    for url in (str(file), f"journal:///{file}"):
        path = write_study(tmp_path / "s", search=f"{{storage: {url}}}")
        for command in ("search", "report"):
            done = CliRunner().invoke(app, [command, str(path)])
            assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)
            assert "is a journal file, which one torn line makes unreadable" in done.stderr
    assert file.read_bytes() == before


MISSING = """
import sys
from normtune import storages
from normtune.errors import StudyError

for url in sys.argv[1:]:
    sys.modules[url.partition("://")[0].partition("+")[2] or "MySQLdb"] = None  # not installed
    for function in (storages.opened, storages.studies_in):
        try:
            function(url)
        except StudyError as error:
            print(error)
"""


def test_a_missing_driver_is_one_line():
    """With what to install."""
    packages = {
        "postgresql+psycopg://u:secret@h/db": "'normtune[postgres]'",
        "postgresql+psycopg2://u:secret@h/db": "'normtune[postgres]' (and write postgresql+psyc",
        "mysql://u:secret@h/db": "pymysql (and write mysql+pymysql://)",
    }
    command = [sys.executable, "-c", MISSING, *packages]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    for url, package in packages.items():
        line = f"the storage {storages.masked(url)} needs a Python package: pip install {package}"
        assert done.stdout.count(line) == 2


def test_a_server_that_refuses_is_one_line(postgres_server):
    """A wrong password, a database that is not there, and no server at all."""
    wrong = postgres_server.url("d", password="wrong-password")  # noqa: S106
    for url, said in (
        (wrong, "password authentication failed"),
        (postgres_server.url("nowhere"), 'database "nowhere" does not exist'),
        ("postgresql+psycopg://u:wrong-password@127.0.0.1:1/d", "onnection refused"),
    ):
        with pytest.raises(StudyError) as caught:
            storages.opened(url)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "wrong-password" not in str(caught.value)


def test_asking_for_studies_makes_nothing(postgres_server, tmp_path):
    """No table in an empty database, no file, and no lock of a study."""
    url = postgres_server.database()
    assert storages.studies_in(url) == ()
    tables = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
    assert postgres_server.execute(tables, url.rpartition("/")[2]) == [(0,)]
    assert storages.studies_in(f"sqlite:///{tmp_path}/x.db") == ()
    assert not list(tmp_path.iterdir())
