"""What mkdocs calls: pages of the site that lie elsewhere, and links that lead there."""

import json
import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"

# Page of the site -> the file that holds it.
ELSEWHERE = {
    "index.md": "README.md",
    "studies.md": "studies/README.md",
    "log.md": "studies/LOG.md",
    "simulation.md": "studies/results/simulation.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "tour.md": "docs/tour.ipynb",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files, config):
    """Add the pages of `ELSEWHERE` and the pictures that they show."""
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, content=text_of(ROOT / source)))
    for picture in sorted((ROOT / "studies" / "results").glob("*.png")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, page, **_):
    """Turn links between files of the repository into links between pages."""
    source = ROOT / ELSEWHERE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    here = Path(page.file.src_uri).parent
    return linked(markdown, source.parent, here)


def linked(markdown, folder, here):
    """The text with every link as the site has it; code is left as it is.

    Args:
        markdown: The text of a page.
        folder: The folder of its file, where its relative links start.
        here: The folder of the page in the site.
    """
    parts = FENCE.split(markdown)
    texts = [
        part if i % 2 else LINK.sub(lambda m: _link(m, folder, here), part)
        for i, part in enumerate(parts)
    ]
    return "".join(texts)


def _link(match, folder, here):
    mark, text, target, anchor = match[1], match[2], match[3], match[4] or ""
    if not target or re.match(r"[a-z]+:", target):
        return match[0]
    file = (folder / target).resolve()
    page = page_of(file)
    if page is None:
        if not file.exists():
            return match[0]  # mkdocs names the broken link
        shown = text if text.startswith("`") else f"{text} (`{file.relative_to(ROOT)}`)"
        return text if text == file.name else shown
    return f"{mark}[{text}]({os.path.relpath(page, here)}{anchor})"


def page_of(file):
    """The page or picture of the site that a file of the repository becomes; None without one."""
    for page, source in ELSEWHERE.items():
        if file == ROOT / source:
            return page
    if file.parent == ROOT / "studies":
        return "studies.md" if file.is_dir() else None
    if file.suffix == ".png" and file.parent == ROOT / "studies" / "results":
        return f"results/{file.name}"
    if file.suffix == ".md" and DOCS in file.parents:
        return file.relative_to(DOCS).as_posix()
    return None


def text_of(source):
    """The Markdown of a file; a notebook with its outputs."""
    text = source.read_text(encoding="utf-8")
    if source.suffix != ".ipynb":
        return text
    return "\n\n".join(_cell(cell) for cell in json.loads(text)["cells"]) + "\n"


def _cell(cell):
    body = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return body
    outputs = cell["outputs"]
    if any("image/png" in o.get("data", ()) for o in outputs):  # not the repr of its axes, too
        outputs = [o for o in outputs if set(o.get("data", ())) != {"text/plain"}]
    return "\n\n".join([f"```python\n{body}\n```", *map(_output, outputs)])


def _output(output):
    """The richest form of an output that a page can show."""
    data = output.get("data", {"text/plain": output.get("text", [])})
    if "image/png" in data:
        picture = "".join("".join(data["image/png"]).split())
        return f'<img alt="The picture of the cell above" src="data:image/png;base64,{picture}">'
    if "text/html" in data:
        return '<div class="output">' + "".join(data["text/html"]).replace("\n\n", "\n") + "</div>"
    return "```text\n" + "".join(data.get("text/plain", [])) + "\n```"
