"""What is released: its metadata, its lower bounds, and what lies in the archives."""

import re

import pins
import pytest

import normtune

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")

import floors  # noqa: E402  needs tomllib

ROOT = floors.ROOT
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = SETUP["project"]


def test_the_lower_bounds_are_those_of_the_project():
    """`make test-oldest` runs what pyproject.toml promises; python tests/floors.py writes it."""
    assert floors.FILE.read_text(encoding="utf-8") == floors.text()


def test_a_dependency_without_a_lower_bound_is_noticed(monkeypatch):
    """The file above cannot leave one out in silence."""
    monkeypatch.setattr(floors.tomllib, "loads", lambda _: {"project": WITHOUT})
    with pytest.raises(ValueError, match="not enough values"):
        floors.floors()


WITHOUT = {"dependencies": ["numpy"], "optional-dependencies": {}}


def test_the_version_stands_in_one_way_everywhere():
    """pyproject.toml, the package and the changes agree."""
    assert PROJECT["version"] == normtune.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(normtune.__version__)}\b", changes, re.MULTILINE)


def test_the_metadata_is_complete():
    """What an index shows of a project, and the marker that makes it typed."""
    wanted = {"description", "readme", "license", "license-files", "requires-python"}
    assert wanted | {"authors", "keywords", "classifiers", "scripts"} <= set(PROJECT)
    assert "Typing :: Typed" in PROJECT["classifiers"]
    assert (ROOT / "normtune" / "py.typed").exists()


def test_every_dependency_of_a_user_is_pinned_for_the_tests():
    """The tests ran with versions that satisfy what is promised."""
    from packaging.requirements import Requirement

    found = {name.lower(): version for name, version in pins.pinned().items()}
    for name, floor in floors.floors().items():
        assert Requirement(f"{name}>={floor}").specifier.contains(found[name.lower()]), name


def test_the_source_archive_holds_what_its_tests_read():
    """Tests, docs and studies go along; every name that is listed exists."""
    listed = SETUP["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert {"normtune", "tests", "docs", "studies", "README.md", "mkdocs.yml"} <= set(listed)
    for name in listed:
        assert (ROOT / name).exists(), name
