"""The docs are run: recipes train, commands parse, generated parts and links are current."""

import ast
import json
import os
import re
import shlex
import socket
import subprocess
import sys

import pytest
import readme_blocks
import torch
import typer.main
from pins import as_pinned
from torch.utils.data import DataLoader, TensorDataset

import normtune
from normtune.cli import app

ROOT = readme_blocks.ROOT
DOCS = ROOT / "docs"
PAGES = (*readme_blocks.PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md")
SECTION = re.compile(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
CONSOLE = re.compile(r"^```(?:console)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
SLOW = pytest.mark.slow


def recipes():
    """The block of every recipe, by its heading."""
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    return {title: PYTHON.findall(body)[0] for title, body in SECTION.findall(text)}


RECIPES = recipes()
FRAMEWORKS = ("Lightning", "Hugging Face Trainer", "Accelerate")
RANKS = ("DDP", "FSDP2")
UNRUN = ("DeepSpeed",)
LOOPS = [title for title in RECIPES if title not in (*FRAMEWORKS, *RANKS, *UNRUN)]


def small():
    """What a reader calls their own."""
    torch.manual_seed(0)
    return {
        "model": net(),
        "generator": net(4),
        "critic": net(),
        "loss_fn": torch.nn.functional.mse_loss,
        "loader": DataLoader(TensorDataset(torch.randn(2240, 4), torch.randn(2240, 1)), 8),
    }


def net(n=1):
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, n))


def run(source, names):
    """Run a block, and give back its recorder or callback."""
    exec(compile(source, "recipe", "exec"), names)  # noqa: S102  the page's own lines
    recorder = names.get("recorder") or names["norms"].recorder
    recorder.close()
    return recorder


@pytest.mark.parametrize("title", LOOPS)
def test_a_recipe_trains_and_suggests(title, tmp_path, monkeypatch, capsys):
    """To the letter, on a small model; the loop is one that normtune has no complaint about."""
    monkeypatch.chdir(tmp_path)
    recorder = run(RECIPES[title], small())
    assert recorder.findings == ()
    assert (tmp_path / "run.norms.jsonl").stat().st_size > 0
    shown = capsys.readouterr().out
    assert "suggested max_norm" in shown or float(shown) > 0


@SLOW
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("title", FRAMEWORKS)
def test_a_recipe_for_a_framework_trains_and_suggests(title, tmp_path, monkeypatch, capsys):
    """The real Trainers, with the block to the letter."""
    monkeypatch.chdir(tmp_path)
    names = {"Lightning": lightning, "Hugging Face Trainer": gpt, "Accelerate": small}[title]()
    recorder = run(RECIPES[title], names)
    assert recorder.findings == ()
    assert "suggested max_norm" in capsys.readouterr().out


def lightning():
    package = pytest.importorskip("lightning")

    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, _):
            return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return small() | {"model": Module()}


def gpt():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    tokens = torch.randint(0, 50, (480, 12), generator=torch.Generator().manual_seed(0))
    dataset = [{"input_ids": row, "labels": row} for row in tokens]
    return {"model": transformers.GPT2LMHeadModel(config), "dataset": dataset}


@SLOW
@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="needs torch.distributed with gloo",
)
@pytest.mark.parametrize("title", RANKS)
def test_a_recipe_for_ranks_runs_under_torchrun(title, tmp_path):
    """Two processes with gloo; rank 0 writes the only file and prints the suggestion."""
    (tmp_path / "train.py").write_text(RECIPES[title])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--master-port", str(port), "train.py"),
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("suggested max_norm") == 1
    assert [file.name for file in tmp_path.glob("*.jsonl")] == ["run.norms.jsonl"]


def test_the_page_says_which_recipe_is_not_run():
    """DeepSpeed is not here; its block is whole Python, and the page says what it rests on."""
    for title in UNRUN:
        ast.parse(RECIPES[title])
    assert "**Not run by us: written from DeepSpeed's source.**" in (DOCS / "recipes.md").read_text(
        encoding="utf-8"
    )


def test_the_block_on_reading_logs_runs(tmp_path, monkeypatch, capsys):
    """The Python of docs/logs.md, on a folder and a CSV file of our own."""
    (block,) = PYTHON.findall((DOCS / "logs.md").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    rows = [{"step": i, "grad_norm": 1 + i % 7, "loss": 1.0} for i in range(1, 61)]
    (tmp_path / "outputs").mkdir()
    state = {"log_history": rows, "global_step": 60}
    (tmp_path / "outputs" / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "metrics.csv").write_text(
        "step,grad_norm\n" + "\n".join(f"{r['step']},{r['grad_norm']}" for r in rows)
    )
    exec(block, {})  # noqa: S102
    assert "grad_norm 60 1.0 7.0" in capsys.readouterr().out


def test_no_other_page_has_python_that_nobody_runs():
    """A new block needs a test: those of the README, the recipes and the logs have theirs."""
    ours = {DOCS / "recipes.md", DOCS / "logs.md", readme_blocks.README}
    assert [p.name for p in PAGES if p not in ours and PYTHON.search(p.read_text("utf-8"))] == []


# --- commands


def typed_commands():
    """Every `normtune ...` line of a console block, once."""
    lines = [
        line.removeprefix("$ ").partition("  #")[0].strip()
        for page in PAGES
        for block in CONSOLE.findall(page.read_text(encoding="utf-8"))
        for line in block.splitlines()
    ]
    names = typer.main.get_command(app).commands
    typed = {line for line in lines if line.startswith("normtune ")}
    return sorted(line for line in typed if line.split()[1] in names)


@pytest.mark.parametrize("line", typed_commands())
def test_a_command_of_the_docs_can_be_typed(line):
    """Its command, options and arguments exist; nothing is run."""
    name, *arguments = shlex.split(line)[1:]
    command = typer.main.get_command(app).commands[name]
    if "--help" not in arguments:
        command.make_context(name, arguments)


def test_a_command_that_does_not_exist_is_noticed():
    """The check above can fail."""
    command = typer.main.get_command(app).commands["suggest"]
    with pytest.raises(Exception, match="--nonsense"):
        command.make_context("suggest", ["log.csv", "--nonsense"])


MADE = [page for page in PAGES if readme_blocks.MADE.search(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", MADE, ids=lambda page: page.name)
def test_a_generated_part_is_current(page):
    """`make readme` writes it from the command line, the study file's model or the planner."""
    if page.name == "commands.md" and not as_pinned("typer"):
        pytest.skip("typer's releases lay out their help differently")
    text = page.read_text(encoding="utf-8")
    for name, body in readme_blocks.MADE.findall(text):
        assert body == readme_blocks.made(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_between_files_lead_somewhere(page):
    """Links to files of the repository, whichever folder they start from."""
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?![a-z]+:)([^)#\s]+)", text):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("name", ["recipes", "frameworks", "logs", "loops", "faq", "search"])
def test_the_readme_leads_to_the_page(name):
    """Nobody has to guess that a page exists."""
    assert f"(docs/{name}.md" in readme_blocks.README.read_text(encoding="utf-8")


# --- files


def test_every_key_of_a_record_is_explained(tmp_path):
    """The page on files names each key that a recorder writes."""
    path = tmp_path / "run.norms.jsonl"
    model = net()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.AdamW(model[2].parameters(), lr=0.1)
    facts = {"batch": 8}
    options = {"groups": model, "metadata": facts, "max_norm": 0.5, "lr_factor": 0.5}
    with normtune.NormRecorder([first, second], path, **options):
        for i in range(4):
            scale = float("inf") if i == 2 else 1.0
            (model(torch.ones(2, 4)).sum() * scale).backward()
            torch.nn.utils.clip_grad_norm_(model[0].parameters(), 2.0)
            first.step()
            torch.nn.utils.clip_grad_norm_(model[2].parameters(), 2.0)  # twice: a finding
            second.step()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            first.zero_grad()
            second.zero_grad()
    normtune.NormRecorder(first, path, resume=True).close()
    text = (DOCS / "files.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"`([a-z_]+)`", text))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    keys = {key for line in lines for key in line}
    assert {"kind", "groups", "asked", "series", "default", "finding"} <= keys
    assert keys <= explained
