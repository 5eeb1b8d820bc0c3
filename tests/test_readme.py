"""The README is run: its commands print what it shows, and its loop works as it stands."""

import re
from pathlib import Path

import pytest
import readme_blocks
import torch
import typer.main

from normtune.cli import app
from normtune.run import Run
from normtune.study import StudyConfig

ROOT = readme_blocks.ROOT
README = readme_blocks.README.read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


SHOWN = readme_blocks.BLOCK.findall(README)


@pytest.mark.parametrize(("command", "expected"), SHOWN, ids=[c for c, _ in SHOWN])
def test_a_command_prints_what_the_readme_shows(command, expected):
    """Help texts and the first screen's suggestion are current; `make readme` writes them."""
    assert readme_blocks.output_of(command) == expected


def test_the_readme_names_every_command():
    """A new command cannot be forgotten; docs/commands.md has their help."""
    commands = set(typer.main.get_command(app).commands)
    assert set(re.findall(r"^\| `normtune ([a-z]+)", README, re.MULTILINE)) == commands


def test_the_readme_reads_in_five_minutes():
    """Its prose, at 260 words a minute; code and tables are looked at, not read."""
    prose = re.sub(r"^(```.*?^```|\|[^\n]*)$", "", README, flags=re.MULTILINE | re.DOTALL)
    assert len(prose.split()) <= 1300


def test_the_loop_of_the_readme_runs_and_suggests(tmp_path, monkeypatch, capsys):
    """The first example, to the letter, on a model, a loader and a loss of our own."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    names = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "loss_fn": torch.nn.functional.mse_loss,
        "loader": [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(120)],
    }
    exec(blocks("python")[0], names)  # noqa: S102  the README's own lines
    assert "suggested max_norm" in capsys.readouterr().out
    assert Path("run.norms.jsonl").exists()
    names["recorder"].close()


def test_the_train_function_of_the_readme_trains(tmp_path):
    """The second example, to the letter, as `normtune search` calls it."""
    x = torch.randn(320, 4, generator=torch.Generator().manual_seed(0))

    def loss(model, part=x):
        return (model(part) - part.sum(1, keepdim=True)).square().mean()

    def train_one_epoch(model, optimizer):
        for part in x.split(8):
            optimizer.zero_grad()
            loss(model, part).backward()
            optimizer.step()

    names = {
        "torch": torch,
        "make_model": lambda: torch.nn.Linear(4, 1),
        "train_one_epoch": train_one_epoch,
        "validation_loss": torch.no_grad()(loss),
    }
    exec(blocks("python")[1], names)  # noqa: S102
    run = Run(params={"lr": 3e-4}, max_norm=0.5, record=tmp_path / "run.norms.jsonl")
    names["train"](run)
    run.recorder.close()
    assert (len(run.values), len(run.recorder.record)) == (5, 200)
    assert run.recorder.suggest(skip=100).max_norm > 0


def test_the_study_file_of_the_readme_is_valid():
    """The YAML that a newcomer copies."""
    import yaml

    (text,) = blocks("yaml")
    assert StudyConfig.model_validate(yaml.safe_load(text)).warmup_steps == 200


def test_the_make_targets_of_the_readme_exist():
    """Every `make` line in it can be typed."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^\$ make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_links_of_the_readme_lead_somewhere():
    """Files it points to are there."""
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
