"""Whether the tests run with the versions that wrote the pages."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FILE = Path(__file__).parent.parent / "constraints.txt"


def pinned():
    """The versions in constraints.txt."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def as_pinned(*names):
    """Whether each of these packages is the one that is pinned; a local part doesn't count."""
    return all(_version(name) == pinned()[name] for name in names)


def _version(name):
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return ""
