"""Writes constraints-oldest.txt: every dependency in pyproject.toml at its lower bound.

`make test-oldest` runs the tests with these versions; a test keeps the file current.
"""

from itertools import chain
from pathlib import Path

import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
FILE = ROOT / "constraints-oldest.txt"
HEAD = "# The lower bounds of pyproject.toml, written by: python tests/floors.py\n"


def floors():
    """The lowest version that each dependency of users may have, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    found = {}
    for requirement in map(Requirement, chain(project["dependencies"], *extras)):
        (floor,) = (s.version for s in requirement.specifier if s.operator == ">=")
        assert found.setdefault(requirement.name, floor) == floor, requirement.name
    return dict(sorted(found.items()))


def text():
    """The whole file."""
    return HEAD + "".join(f"{name}=={floor}\n" for name, floor in floors().items())


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
