# `make` says what there is. `make PYTHON=python3.12 ...` picks the Python that .venv is made with.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# Tests wait for what they start a third of the time: one more than there are cores.
WORKERS := $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)

.DEFAULT_GOAL := help
.PHONY: help .venv demo test soak lint format clean

help:  ## Say what there is
	@sed -nE 's/^([a-z.]+):.*## /  make \1\t/p' Makefile | expand -t 16

.venv: .venv/installed  ## Install brain_jax, and what requirements.lock lists, into .venv

demo: .venv/installed  ## Train on generated images into runs/demo; needs no data, weights or accelerator
	$(BIN)/python -m brain_jax.main --config configs/densenet121.py:demo --workdir runs/demo

test: lint  ## Check the style and run the tests
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

soak: .venv/installed-test  ## Run the long tests of what may go wrong, and every command of the docs: over an hour
	$(BIN)/python -m pytest -m soak -s

lint: .venv/installed-test  ## Check the style
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: .venv/installed-test  ## Put the style right
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## Remove .venv and caches; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are touched last: an installation that was cut short is done again.
.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo 'error: brain_jax needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is none of them.' \
	    'Name one: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@echo 'Installing into .venv: a few minutes, 2.6 GB'
	@$(PIP) install --require-hashes -r requirements.lock
	@$(PIP) install --no-deps --editable .
	@touch $@

.venv/installed-test: .venv/installed requirements-test.txt
	@$(PIP) install -r requirements-test.txt
	@touch $@
