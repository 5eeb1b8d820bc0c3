"""Runs the cells of `tour.py` and writes `tour.ipynb` with what they gave; takes minutes."""

import ast
import base64
import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
SOURCE, NOTEBOOK = DOCS / "tour.py", DOCS / "tour.ipynb"
MARK = re.compile(r"^# %%([^\n]*)\n(.*?)(?=^# %%|\Z)", re.MULTILINE | re.DOTALL)


def cells(text):
    """The cells of a script: their kind (markdown, slow or nothing) and their source."""
    found = []
    for kind, body in MARK.findall(text):
        source = body.strip("\n")
        if kind.strip() == "[markdown]":
            source = "\n".join(line[2:] for line in source.splitlines())
        found.append((kind.strip().strip("[]"), source))
    return found


def run(source, names):
    """Run a cell; its outputs as a notebook keeps them."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    value = None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), names)  # noqa: S102  the tour's own lines
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)  # noqa: S307
    outputs = [_stream(printed.getvalue())] if printed.getvalue() else []
    if value is not None and not source.rstrip().endswith(";"):
        outputs.append(_result(value))
    return outputs + _figures()


def _stream(text):
    return {"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)}


def _result(value):
    data = {"text/plain": str(value).splitlines(keepends=True)}
    if hasattr(value, "_repr_html_"):
        data["text/html"] = value._repr_html_().splitlines(keepends=True)
    return {"output_type": "display_data", "data": data, "metadata": {}}


def _figures():
    """Open figures as PNG, closed afterwards."""
    from matplotlib import pyplot as plt

    outputs = []
    for number in plt.get_fignums():
        stream = io.BytesIO()
        plt.figure(number).savefig(stream, format="png", dpi=80)
        data = {"image/png": base64.b64encode(stream.getvalue()).decode()}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    plt.close("all")
    return outputs


def notebook(text, *, slow=True):
    """The executed notebook of a script; without `slow` those cells are left unrun."""
    _figures()  # none from before belongs to it
    names = {"__name__": "__main__"}
    made = []
    for i, (kind, source) in enumerate(cells(text)):
        cell = {"id": f"cell-{i}", "metadata": {}, "source": source.splitlines(keepends=True)}
        if kind == "markdown":
            made.append(cell | {"cell_type": "markdown"})
            continue
        outputs = run(source, names) if slow or kind != "slow" else []
        made.append(cell | {"cell_type": "code", "execution_count": None, "outputs": outputs})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


if __name__ == "__main__":
    import matplotlib as mpl

    mpl.use("agg")
    os.chdir(DOCS.parent)
    made = notebook(SOURCE.read_text(encoding="utf-8"), slow="--quick" not in sys.argv)
    NOTEBOOK.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
