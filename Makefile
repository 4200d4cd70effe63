# `make quickstart` and `make test` need Python 3.11 or later, make and a package index; they create .venv themselves.
#   PYTHON=python3.12        the interpreter the environment is made with
#   PYTHON312=python3.12     the interpreter, 3.12 or later, of the second environment (`make test-gpu-lowering`)
#   PYTHON_GPU=python3       the interpreter of `make gpu-check`, as it is
#   PIP_ARGS="..."           more arguments for pip; on Linux, torch without CUDA:
#                            PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#   ARGS="--seed 1"          more arguments for `mllmrec run quickstart`
#   PYTEST_ARGS="-k splits"  more arguments for pytest

PYTHON ?= python3
PYTHON312 ?= python3.12
PYTHON_GPU ?= python3
VENV ?= .venv
LOWERING_VENV ?= .venv-gpu-lowering
PIP_ARGS ?=
ARGS ?=
PYTEST_ARGS ?=
# A test file stays on one worker, which compiles what its tests share once.
WORKERS := -n auto --dist loadfile

BIN := $(VENV)/bin
LOWERING_BIN := $(LOWERING_VENV)/bin
REQUIREMENTS := pyproject.toml setup.py constraints.txt
# Installed first and by itself, so that nothing newer is fetched; torch's CUDA build, where an index gives that one, replaces it.
TRITON := "triton==3.6.0; sys_platform == 'linux'"

.PHONY: help quickstart test test-fast test-gpu-lowering gpu-check wheel-test lint format typecheck env env-dev env-gpu-lowering clean

help:
	@echo "make quickstart | test | test-fast | test-gpu-lowering | gpu-check | wheel-test | lint | format | typecheck"
	@echo "     env | env-dev | env-gpu-lowering | clean"

quickstart: $(VENV)/.installed
	$(BIN)/mllmrec run quickstart $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(WORKERS) $(PYTEST_ARGS)

test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(WORKERS) -m "not slow" $(PYTEST_ARGS)

# On the JAX release that GPUs run, without a GPU and without torch: programs lowered for CUDA, then every test that needs neither.
# Kernels are interpreted or compiled, one or the other in a process: hence two.
test-gpu-lowering: $(LOWERING_VENV)/.installed
	TRITON_INTERPRET=0 MLLMREC_TRITON_DEVICE=sm_90 $(LOWERING_BIN)/python -m pytest -m gpu_lowering $(PYTEST_ARGS)
	$(LOWERING_BIN)/python -m pytest $(WORKERS) -m "not slow and not gpu_lowering" $(PYTEST_ARGS)

# On a machine with an NVIDIA GPU and whatever Python there has jax with CUDA, triton and jax-triton: nothing is installed, and a part that
# needs more is skipped by name.
gpu-check:
	$(PYTHON_GPU) profiling/gpu_check.py $(ARGS)

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
env-gpu-lowering: $(LOWERING_VENV)/.installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is not Python 3.11 or later; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(REQUIREMENTS) | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_ARGS) --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(REQUIREMENTS) Makefile | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps $(TRITON)
	$(BIN)/python -m pip install $(PIP_ARGS) --constraint constraints.txt --editable ".[dev]"
	@touch $@ $(VENV)/.installed

$(LOWERING_BIN)/python:
	@$(PYTHON312) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
	  { echo "error: $(PYTHON312) is not Python 3.12 or later, which jax 0.11 needs; name one: make PYTHON312=/path/to/python3.12 ..." >&2; \
	    exit 1; }
	$(PYTHON312) -m venv $(LOWERING_VENV)

# The plugin's dependencies are the CUDA libraries, gigabytes that only a program that runs on a GPU needs.
$(LOWERING_VENV)/.installed: $(REQUIREMENTS) Makefile | $(LOWERING_BIN)/python
	$(LOWERING_BIN)/python -m pip install $(PIP_ARGS) --no-deps $(TRITON)
	$(LOWERING_BIN)/python -m pip install $(PIP_ARGS) --constraint constraints.txt --editable ".[gpu-lowering]"
	$(LOWERING_BIN)/python -m pip install $(PIP_ARGS) --constraint constraints.txt --no-deps jax-cuda13-plugin
	@touch $@

clean:
	rm -rf $(VENV) $(LOWERING_VENV) build dist *.egg-info .jax_cache .pytest_cache .ruff_cache .hypothesis
