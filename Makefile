# Every target makes its own environment in .venv when there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test check format lint types bench readme notebook docs dist release-check test-oldest test-newest clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[plot,studies,lightning,transformers,accelerate,postgres]' --group dev --group bench
	$(BIN)/python -m pip install --quiet --no-deps aeon==1.6.0  # only its data are read
	@touch $@

demo: $(READY)  ## Train a character LSTM, record its norms, suggest a max_norm, and check it (about 5 minutes)
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

readme: $(READY)  ## Write the outputs and tables that the README and the docs show
	$(BIN)/python tests/readme_blocks.py

docs: $(READY)  ## Build the site into site/, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dist: $(READY)  ## Build the wheel and the source archive into dist/
	$(BIN)/python -m pip install --quiet -c constraints.txt --group release
	rm -rf dist && $(BIN)/python -m build && $(BIN)/python -m twine check --strict dist/*

release-check: dist  ## Install wheel and source archive in new environments, and use them (minutes)
	$(BIN)/python tests/release_check.py dist/*

# Environments of their own, with uv: pip takes minutes to find out what fits. TORCH=2.13.0 takes that torch.
OLDEST ?= .venv-oldest
NEWEST ?= .venv-newest
EXTRAS := .[plot,studies,lightning,transformers,accelerate,postgres]
UV = $(1)/bin/uv pip install --quiet --python $(1)/bin/python $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS))
define new-env
	$(PYTHON) -m venv $(1) && $(1)/bin/python -m pip install --quiet uv
endef
define test-in
	$(call UV,$(1)) $(2) $(if $(TORCH),torch==$(TORCH)) -e '$(EXTRAS)' --group test --group bench
	$(call UV,$(1)) --no-deps aeon==1.6.0
	$(1)/bin/python -m pytest -n $(WORKERS) --dist loadfile -q $(ARGS)
endef

test-oldest:  ## Run the tests with the lower bounds of pyproject.toml (large downloads)
	$(call new-env,$(OLDEST))
	grep -v '$(if $(TORCH),^torch==,^$$)' constraints-oldest.txt > $(OLDEST)/constraints.txt
	$(call test-in,$(OLDEST),-c $(OLDEST)/constraints.txt)

test-newest:  ## Run the tests with the newest release of every dependency (large downloads)
	$(call new-env,$(NEWEST))
	$(call test-in,$(NEWEST),--upgrade)

notebook: $(READY)  ## Run the notebook of the docs again (minutes)
	$(BIN)/python docs/make_notebook.py

clean:  ## Remove the environment and everything that was made
	rm -rf $(VENV) $(OLDEST) $(NEWEST) demo-out build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
