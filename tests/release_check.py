"""Installs each given archive into a new environment and uses it there; `make release-check`."""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent

USED = """\
import normtune

value: float = normtune.suggest([0.1 * (i % 10 + 1) for i in range(100)]).max_norm
"""
MISUSED = USED.replace("float", "str")


def run(*command, cwd, fails=False):
    """What a command prints; an end that is not the expected one ends the check."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if bool(done.returncode) != fails:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def check(archive, folder):
    """Install an archive in `folder`, then look at it as a user would."""
    venv.create(folder / "venv", with_pip=True)
    programs = folder / "venv" / "bin"
    python = programs / "python"
    install = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
    run(*install, archive, "mypy", "pandas-stubs", cwd=folder)
    shown = run(programs / "normtune", "--help", cwd=folder)
    assert "suggest" in shown, shown
    log = folder / "log.csv"
    log.write_text("step,grad_norm\n" + "\n".join(f"{i},{1 + i % 7}" for i in range(1, 101)))
    shown = run(programs / "normtune", "suggest", "log.csv", cwd=folder)
    assert "suggested max_norm" in shown, shown
    run(python, "-c", "import normtune; normtune.NormRecorder, normtune.load_result", cwd=folder)
    run(python, "-m", "normtune", "--version", cwd=folder)
    (folder / "used.py").write_text(USED)
    run(python, "-m", "mypy", "--strict", "used.py", cwd=folder)
    (folder / "misused.py").write_text(MISUSED)
    shown = run(python, "-m", "mypy", "--strict", "misused.py", cwd=folder, fails=True)
    assert 'expression has type "float"' in shown, shown
    print(f"{archive.name}: installs, runs, is typed")


if __name__ == "__main__":
    for given in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as place:
            check(Path(given).absolute(), Path(place))
