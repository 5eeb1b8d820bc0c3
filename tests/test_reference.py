"""The reference: every public name is in it, with a docstring that is whole, and the site builds."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import readme_blocks
import yaml

import normtune

griffe = pytest.importorskip("griffe", reason="needs mkdocstrings")

ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]

ROOT = readme_blocks.ROOT
PAGE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
ENTRY = re.compile(r"^::: (\S+)\n((?:    [^\n]*\n|\n)*)", re.MULTILINE)
CALLBACKS = (
    "normtune.integrations.hooks.NormHooks",
    "normtune.integrations.lightning.NormCallback",
    "normtune.integrations.pytorch_lightning.NormCallback",
    "normtune.integrations.transformers.NormCallback",
    "normtune.integrations.accelerate.record",
)
RULES = {f"normtune.rules.{name}" for name in (*normtune.RULES, "percentile")}


@pytest.fixture(scope="module")
def package():
    """The package as griffe reads it, without importing it."""
    return griffe.load("normtune", search_paths=[str(ROOT)], docstring_parser="google")


def entries():
    """The names on the page, with the members that each shows; None is all of them."""
    for path, options in ENTRY.findall(PAGE):
        told = yaml.safe_load(options) or {}
        yield path, told.get("options", {}).get("members")


def documented(package):
    """Every function, class and method that the page shows, by its path."""
    found = {}
    for path, members in entries():
        item = package[path.removeprefix("normtune.")]
        found[path] = item
        names = members if members is not None else list(item.members)
        for name in names:
            if not name.startswith("_"):
                member = item.members[name]
                found[f"{path}.{name}"] = member.final_target if member.is_alias else member
                if member.is_class:
                    found |= methods(f"{path}.{name}", member)
    return found


def methods(path, item):
    target = item.final_target if item.is_alias else item
    return {f"{path}.{n}": m for n, m in target.members.items() if not n.startswith("_")}


def test_every_public_name_is_in_the_reference():
    """All of `normtune.__all__`, and what the integrations offer."""
    homes = {f"normtune.{home}.{name}" for name, home in normtune._HOMES.items()}
    shown = {path for path, _ in entries()}
    shown |= {f"{path}.{name}" for path, members in entries() for name in members or ()}
    shown |= {path.replace("records.record", "records") for path in shown}
    errors = {name for name in homes if name.startswith("normtune.errors.")}
    assert "normtune.errors" in shown
    assert homes - errors - shown == set()
    assert set(CALLBACKS) <= shown


def test_every_documented_name_has_a_whole_docstring(package):
    """Arguments, what comes back, and what the body raises; fields of a class as its attributes."""
    faults = []
    for path, item in documented(package).items():
        if item.is_attribute and not item.labels & {"property"}:
            continue
        faults += [f"{path}: {fault}" for fault in lacks(item)]
    assert faults == []


def lacks(item):
    """What the docstring of an item leaves out; what a rule takes and gives stands in its module."""
    if item.docstring is None:
        return ["no docstring"]
    if item.path in RULES:
        return []
    sections = {s.kind.value: s.value for s in item.docstring.parse("google", warnings=False)}
    if item.is_function:
        return [*_arguments(item, sections), *_returns(item, sections), *_raises(item, sections)]
    if item.is_class and "dataclass" in " ".join(str(d.value) for d in item.decorators):
        told = {a.name for a in sections.get("attributes", ())}
        fields = [n for n, m in item.members.items() if m.is_attribute and n[0] != "_"]
        fields = [n for n in fields if "property" not in item.members[n].labels]
        return [f"attribute {name}" for name in fields if name not in told]
    if item.is_class and "__init__" in item.members:
        init = item.members["__init__"]
        return [*_arguments(init, sections), *_raises(init, sections)]
    return []


def _arguments(item, sections):
    told = {p.name for p in sections.get("parameters", ())}
    asked = [p.name for p in item.parameters if p.name not in ("self", "cls")]
    return [f"argument {name}" for name in asked if name.lstrip("*") not in told]


def _returns(item, sections):
    """A call without arguments says in its summary what it gives."""
    bare = [p for p in item.parameters if p.name not in ("self", "cls")]
    gives = str(item.returns or "None") not in ("None", "NoReturn")
    return ["what it returns"] if gives and bare and "returns" not in sections else []


def _raises(item, sections):
    """Errors that the body itself raises by name."""
    body = "\n".join(item.lines)
    told = {str(r.annotation) for r in sections.get("raises", ())}
    return [
        f"error {e}" for e in re.findall(r"^\s+raise (\w+)\(", body, re.MULTILINE) if e not in told
    ]


def test_a_docstring_that_leaves_something_out_is_noticed(tmp_path):
    """The check above can fail."""
    (tmp_path / "poor.py").write_text(
        'def f(a, b) -> int:\n    """Add.\n\n    Args:\n        a: One.\n    """\n'
        "    raise ValueError(a)\n"
    )
    module = griffe.load("poor", search_paths=[str(tmp_path)])
    assert lacks(module["f"]) == ["argument b", "what it returns", "error ValueError"]


# --- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built strictly: a warning is an error."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


LOADS = re.compile(r"<(?:link|script|img|iframe|source)\b[^>]*?(?:src|href)=\"?([^\"\s>]+)")


def test_no_page_of_the_site_loads_anything_from_elsewhere(site):
    """Styles, scripts, fonts and pictures lie beside the pages; only links lead away."""
    pages = list(site.rglob("*.html"))
    assert {"index.html", "recipes.html", "reference.html", "tour.html"} <= {p.name for p in pages}
    for page in pages:
        for loaded in LOADS.findall(page.read_text(encoding="utf-8")):
            assert not loaded.startswith(("http:", "https:", "//")), (page.name, loaded)
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(\"?(?:https?:)?//", style.read_text(encoding="utf-8"))


def test_the_site_shows_every_public_name(site):
    """Each has a heading in the built reference."""
    text = (site / "reference.html").read_text(encoding="utf-8")
    for name, home in normtune._HOMES.items():
        assert re.search(rf'id="normtune\.{home}(?:\.record)?\.{name}"', text), name


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1300, "light")])
def test_the_site_opens_quietly_in_a_browser(width, scheme, site):
    """From the disk: no console message, no request to anywhere else, nothing wider than it."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or pytest.skip("chromium is not installed")
    said, asked = [], []
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        for file in sorted(set(site.glob("*.html")) - {site / "404.html"}):
            page.goto(file.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width, file.name
        browser.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
