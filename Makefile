# `make quickstart` and `make test` need Python 3.11 or later, make and a package index; they create .venv themselves.
#   PYTHON=python3.12        the interpreter the environment is made with
#   PIP_ARGS="..."           more arguments for pip; on Linux, torch without CUDA:
#                            PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#   ARGS="--seed 1"          more arguments for `mllmrec run quickstart`
#   PYTEST_ARGS="-k splits"  more arguments for pytest

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
REQUIREMENTS := pyproject.toml setup.py constraints.txt

.PHONY: help quickstart test test-fast wheel-test lint format typecheck env env-dev clean

help:
	@echo "make quickstart | test | test-fast | wheel-test | lint | format | typecheck | env | env-dev | clean"

quickstart: $(VENV)/.installed
	$(BIN)/mllmrec run quickstart $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

# The wheel in an environment of its own, with its dependencies installed from the index (`make test` borrows them instead).
wheel-test: $(VENV)/.installed-dev
	MLLMREC_WHEEL_DEPENDENCIES=install $(BIN)/python -m pytest tests/test_wheel.py $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/.installed-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

env: $(VENV)/.installed
env-dev: $(VENV)/.installed-dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is not Python 3.11 or later; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(REQUIREMENTS) | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_ARGS) --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(REQUIREMENTS) | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_ARGS) --constraint constraints.txt --editable ".[dev]"
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info .jax_cache .pytest_cache .ruff_cache .hypothesis
