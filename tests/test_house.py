"""The house: imports go down, heavy ones stay out of the command line, and the guards can fail."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent / "normtune"

# Lower floors first; a room imports from lower floors only.
FLOORS = [
    {"errors", "statistics", "findings", "trials", "shares", "format"},
    {"markup", "terminal", "surrogate", "paired", "divergence", "pruning", "patience"},
    {"arms"},
    {"fresh"},
    {"sentences"},
    {"records", "ranks", "rules", "comparison", "learning_rates", "storages"},
    {
        "sources",
        "orders",
        "gradients",
        "doubts",
        "plots",
        "tasks",
        "plan",
        "callsites",
        "listening",
    },
    {
        "results",
        "clipping",
        "stepping",
        "events",
        "optimizers",
        "suggestion",
        "processes",
        "ledger",
        "study",
        "metrics",
    },
    {"fsdp1", "backwards"},
    {"interception", "pairing", "belt", "pictures", "contents", "parcels", "presence", "slots"},
    {"buffer", "pages", "watcher"},
    {"recorder"},
    {"run", "baseline", "automatic", "integrations", "launch"},
    {"assignments", "commands", "stored", "crew", "proofs"},
    {"controller", "worker"},
    {"search", "reports"},
    {"cli"},
    {"__init__", "__main__"},
]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}


def room_of(file):
    relative = file.relative_to(HOUSE)
    return relative.parts[0].removesuffix(".py")


def imports_of(tree):
    """The rooms that a module imports when it runs; imports for type checkers do not count."""
    checked = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.dump(test.test)
        for node in ast.walk(test)
    }
    for node in ast.walk(tree):
        if id(node) in checked:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("normtune"):
            parts = (node.module or "").split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("normtune."):
                    yield alias.name.split(".")[1]


def upward(room, tree):
    """The imports of a room that do not go down."""
    names = [n for n in imports_of(tree) if n in FLOOR]
    return [n for n in names if n != room and FLOOR[n] >= FLOOR[room]]


ROOMS = sorted(HOUSE.rglob("*.py"))


@pytest.mark.parametrize("file", ROOMS, ids=lambda f: str(f.relative_to(HOUSE)))
def test_imports_go_to_lower_floors_only(file):
    """Every room has its floor, and imports only from below."""
    room = room_of(file)
    if room == "inject":
        return  # loaded by foreign processes; it reaches the house by its own door
    assert room in FLOOR, f"{room} has no floor yet; add it to FLOORS"
    assert upward(room, ast.parse(file.read_text(encoding="utf-8"))) == []


def test_the_floor_guard_notices_an_import_that_goes_up():
    """A record that imported the recorder would be found."""
    assert upward("records", ast.parse("from normtune.recorder import NormRecorder")) == [
        "recorder"
    ]
    assert upward("records", ast.parse("from normtune import errors, cli")) == ["cli"]


HEAVY = ("torch", "optuna", "matplotlib", "scipy.stats", "pandas")


def loaded_by(code):
    """Which heavy packages are loaded after `code` ran in a fresh Python."""
    probe = (
        textwrap.dedent(code) + f"\nimport sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True
    )
    return ast.literal_eval(done.stdout.strip().splitlines()[-1])


def test_import_normtune_loads_nothing_heavy():
    """The names of the package are loaded when they are first used."""
    assert loaded_by("import normtune, normtune.errors; dir(normtune)") == []


def command(*arguments):
    return f"""
        import sys
        sys.argv = ["normtune", *{list(arguments)!r}]
        from normtune.cli import main
        try:
            main()
        except SystemExit:
            pass
    """


def test_help_and_suggest_load_no_heavy_package(tmp_path):
    """The command line starts without torch, optuna, pandas, matplotlib and scipy.stats."""
    log = tmp_path / "log.csv"
    log.write_text("step,grad_norm\n" + "\n".join(f"{i},{1 + i % 7}" for i in range(60)))
    assert loaded_by(command("--help")) == []
    assert loaded_by(command("suggest", str(log))) == []


def test_the_import_guard_notices_a_heavy_package():
    """The probe that finds nothing above finds pandas when it is there."""
    assert loaded_by("import pandas") == ["pandas"]


def test_public_names_exist():
    """Everything in __all__ can be had."""
    import normtune

    for name in normtune.__all__:
        assert getattr(normtune, name) is not None
    with pytest.raises(AttributeError):
        normtune.nonsense  # noqa: B018
