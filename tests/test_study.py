"""The study file: what it accepts, and the one line that each fault gets."""

from pathlib import Path

import pytest

from normtune.errors import StudyError
from normtune.study import MAX_BYTES, cores, load_study


@pytest.fixture
def write(tmp_path):
    """Write a study file beside a training; gives its path."""
    (tmp_path / "a.py").write_text("def train(run): ...\n")

    def write(text: str | bytes) -> Path:
        path = tmp_path / "s.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_reads_what_the_design_shows(write):
    """Every key of a study lands in the configuration, and the rest has its default."""
    text = "train: a.py:train\nparams: {lr: 1.0, hidden: 128}\nwarmup_steps: 100\nrule: p95\n"
    study = load_study(write(text + "search: {max_runs: 12, lr_runs: 5, margin: 1 %, jobs: 2}\n"))
    assert study.config.params == {"lr": 1.0, "hidden": 128}
    assert (study.config.warmup_steps, study.config.rule) == (100, "p95")
    assert study.config.direction == "minimize"
    search = study.config.search
    assert (search.max_runs, search.lr_runs, search.margin, search.jobs) == (12, 5, "1 %", 2)
    assert (search.value, search.explore_fraction) == ("last", 1.0)


def test_scalars_mean_what_they_look_like(write):
    """Numbers in scientific notation are numbers, and words and times of day stay text."""
    study = load_study(
        write("train: a.py:train\nparams: {lr: 1e-3, x: no, t: 12:30:45, s: '1e-3', n: ~}\n")
    )
    expected = {"lr": 1e-3, "x": "no", "t": "12:30:45", "s": "1e-3", "n": None}
    assert study.config.params == expected


@pytest.mark.parametrize(("text", "margin"), [("1e-3", 1e-3), ("0.5%", "0.5%"), ("1 %", "1 %")])
def test_margin_in_units_or_percent(write, text, margin):
    """A margin is a number of loss units or a percentage."""
    study = load_study(write(f"train: a.py:train\nsearch: {{margin: {text}}}\n"))
    assert study.config.search.margin == margin


def test_storage_lies_beside_the_study(write, tmp_path):
    """Without a storage it is SQLite beside the file, and a relative one starts there, too."""
    assert load_study(write("train: a.py:train\n")).storage == f"sqlite:///{tmp_path}/s.db"
    text = "train: a.py:train\nsearch: {storage: 'sqlite:///other.db'}\n"
    assert load_study(write(text)).storage == f"sqlite:///{tmp_path}/other.db"
    text = "train: a.py:train\nsearch: {storage: 'postgresql://h/db'}\n"
    assert load_study(write(text)).storage == "postgresql://h/db"


def test_a_command_is_understood(write):
    """The form with a command keeps its arguments and its metric."""
    study = load_study(write("command: [python, t.py, '{seed}']\nmetric: 'loss ([0-9.]+)'\n"))
    assert study.config.command == ("python", "t.py", "{seed}")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("1.5", 1.5), ("30 min", 1800), ("2h", 7200)]
)
def test_a_time_limit_in_seconds_or_words(write, text, seconds):
    """A bare number is seconds."""
    study = load_study(write(f"train: a.py:train\nsearch: {{time_limit: {text}}}\n"))
    assert study.config.search.time_limit == seconds


def test_threads_of_a_command_are_the_users_own(write, monkeypatch):
    """OMP_NUM_THREADS of the shell holds for a command; cores are divided without it."""
    keys = "command: [x, '{seed}']\nmetric: 'l (.)'\n"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert load_study(write(keys)).threads(2) == 3
    assert load_study(write(keys + "threads: 5\n")).threads(2) == 5
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert load_study(write(keys)).threads(1) == cores()
    assert load_study(write("train: a.py:train\n")).threads(cores()) == 1


FAULTS = {
    "unknown key": ("train: a.py:train\nserch: {}\n", "s.yaml:2: serch: unknown key; did you mean"),
    "unknown nested key": (
        "train: a.py:train\nsearch:\n  max_run: 9\n",
        "s.yaml:3: search.max_run: unknown key; did you mean max_runs?",
    ),
    "no near key": ("train: a.py:train\nqqq: 1\n", "s.yaml:2: qqq: unknown key; known: train,"),
    "string for a number": (
        "train: a.py:train\nsearch:\n  max_runs: '24'\n",
        "s.yaml:3: search.max_runs: must be an integer but got '24'",
    ),
    "boolean for a number": (
        "train: a.py:train\nsearch: {lr_runs: true}\n",
        "search.lr_runs: must",
    ),
    "too few steps": ("train: a.py:train\nwarmup_steps: 3\n", "s.yaml:2: warmup_steps: must be gr"),
    "two faults": ("train: a.py:train\nrule: 1\nsearch: 3\n", "but got 1 (and 1 more)"),
    "a percentile as a share": ("train: a.py:train\nrule: p0.9\n", "write p90"),
    "an unknown rule": ("train: a.py:train\nrule: best\n", "s.yaml:2: rule:"),
    "a direction": ("train: a.py:train\ndirection: minimise\n", "'minimize' or 'maximize'"),
    "a margin of zero": ("train: a.py:train\nsearch: {margin: 0 %}\n", "search.margin: must be a"),
    "a word for a margin": ("train: a.py:train\nsearch: {margin: small}\n", "but got 'small'"),
    "a tab": ("train: a.py:train\nsearch:\n\tjobs: 1\n", "s.yaml:3: a tab; YAML is indented"),
    "an alias": ("a: &x [1]\nb: *x\n", "s.yaml:2: aliases (*x) are not read"),
    "a key twice": ("train: a.py:train\ntrain: b\n", "s.yaml:2: the key 'train' appears twice"),
    "a Python object": ("train: !!python/object/apply:os.system [x]\n", "could not determine"),
    "a list as key": ("[1, 2]: 3\n", "s.yaml:1: a key must be text"),
    "no YAML": ("train: 'a\n", "unexpected end of stream"),
    "empty": ("", "s.yaml is empty"),
    "a list": ("- a\n", "a study file holds keys"),
    "binary": (b"\x00\x01", "special characters are not allowed"),
    "not UTF-8": (b"\xff\xfe", "not text in UTF-8"),
    "huge": ("#" * (MAX_BYTES + 1), "is larger than"),
    "deep": ("[" * 50_000, "s.yaml:1: nested more than 20 deep"),
    "no training": ("rule: p90\n", "needs either train:"),
    "two trainings": ("train: a.py:train\ncommand: [x]\nmetric: y\n", "but got both"),
    "a command without metric": ("command: [x]\n", "a command needs metric:"),
    "two metrics": (
        "command: [x]\nmetric: (.)\nmetric_file: a:b\n",
        "json:eval_loss', but got both",
    ),
    "a metric without group": (
        "command: [x]\nmetric: loss\n",
        "needs parentheses around the number",
    ),
    "a metric that is no pattern": (
        "command: [x]\nmetric: (\n",
        "is no regular expression: missing )",
    ),
    "a file without key": ("command: [x]\nmetric_file: a.json\n", "metric_file must be path:key"),
    "a command without seed": ("command: [x]\nmetric: (.)\n", "each run needs a seed of its own"),
    "params of a command": (
        "command: [x]\nmetric: (.)\nseed_inside: true\nparams: {lr: 1}\n",
        "params: is for a train function",
    ),
    "a shorter command": (
        "command: [x]\nmetric: (.)\nseed_inside: true\nsearch: {explore_fraction: 0.5}\n",
        "search.explore_fraction: is for a train function",
    ),
    "a seed for a function": ("train: a.py:train\nseed_inside: true\n", "draws from run.seed"),
    "a time in words": (
        "train: a.py:train\nsearch: {time_limit: an hour}\n",
        "s.yaml:2: search.time_limit: must be a time such as 90 s, 30 min or 2 h but got",
    ),
    "no time at all": ("train: a.py:train\nsearch: {time_limit: 0 s}\n", "greater than 0"),
    "a metric for a function": ("train: a.py:train\nmetric: x\n", "run.report(value)"),
    "no function": ("train: a.py\n", "file.py:function or package.module:function but got 'a.py'"),
    "no such file": ("train: b.py:train\n", "s.yaml:1: train: no such file:"),
}


@pytest.mark.parametrize(("text", "said"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_one_line_with_its_place(write, text, said):
    """Whatever is wrong with the file, the user gets a single line that says what and where."""
    with pytest.raises(StudyError) as caught:
        load_study(write(text))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    """A study file that is not there is named in the error."""
    with pytest.raises(StudyError, match=r"cannot read the study .*nowhere\.yaml: No such file"):
        load_study(tmp_path / "nowhere.yaml")


def test_aliases_cannot_grow(write):
    """The bomb of nested aliases is refused before anything is built from it."""
    bomb = "a: &a [x,x,x]\nb: &b [*a,*a,*a]\nc: &c [*b,*b,*b]\n"
    with pytest.raises(StudyError, match=r"aliases \(\*a\) are not read"):
        load_study(write(bomb))


def test_fingerprint_sees_the_training(write, tmp_path):
    """Parameters and the training's source are part of what a study is; the budget is not."""
    first = load_study(write("train: a.py:train\nparams: {lr: 1}\n")).fingerprint()
    budget = load_study(write("train: a.py:train\nparams: {lr: 1}\nsearch: {max_runs: 9}\n"))
    assert budget.fingerprint() == first
    other = load_study(write("train: a.py:train\nparams: {lr: 2}\n")).fingerprint()
    assert {k for k in first if first[k] != other[k]} == {"params.lr"}
    (tmp_path / "a.py").write_text("def train(run): return 1\n")
    edited = load_study(write("train: a.py:train\nparams: {lr: 1}\n")).fingerprint()
    assert {k for k in first if first[k] != edited[k]} == {"contents of the train file"}
