# Every target makes its own environment in .venv when there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test check format lint types bench readme notebook clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[plot,studies,lightning,transformers,accelerate]' --group dev --group bench
	$(BIN)/python -m pip install --quiet --no-deps aeon==1.6.0  # only its data are read
	@touch $@

demo: $(READY)  ## Train a character LSTM, record its norms, suggest a max_norm, and prove it (under 5 minutes)
	@rm -rf demo-out && mkdir demo-out && cp studies/char_lm.py studies/char_lm.yaml demo-out/
	$(BIN)/normtune record demo-out/char_lm.yaml --output demo-out/warmup.norms.jsonl
	$(BIN)/normtune search demo-out/char_lm.yaml

test: $(READY)  ## Run the tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -q

check: $(READY) format lint types test  ## Format, lint, types and tests

format: $(READY)  ## Show what the formatter would change
	$(BIN)/ruff format --check --diff .

lint: $(READY)  ## ruff
	$(BIN)/ruff check .

types: $(READY)  ## mypy --strict
	$(BIN)/mypy

bench: $(READY)  ## Speed and memory as ratios of two things timed in turn
	$(BIN)/python studies/bench.py

readme: $(READY)  ## Write the outputs that the README shows
	$(BIN)/python tests/readme_blocks.py

notebook: $(READY)  ## Run the notebook of the docs again (minutes)
	$(BIN)/python docs/make_notebook.py

clean:  ## Remove the environment and everything that was made
	rm -rf $(VENV) demo-out build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
