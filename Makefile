# Every target sets up what it needs: git, make, a Python >= 3.12 (or PYTHON=/path/to/one) and a package registry are enough.
# An environment is made once and reinstalled when pyproject.toml changes.
SHELL := /bin/bash
VENV ?= .venv
RUN := $(VENV)/bin
# Two CPU-bound processes on two cores: torch's thread pool in each of them would only fight XLA's.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$(( n > 8 ? 8 : n )))

.PHONY: help demo test gpu-test sanitize lint format types clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.installed-base  ## train a tiny model for real, offline, on the CPU (about two minutes)
	JAX_PLATFORMS=cpu $(RUN)/python -m fastjax.demo

test: $(VENV)/.installed-test  ## run every test that needs no GPU
	JAX_PLATFORMS=cpu OMP_NUM_THREADS=1 $(RUN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(ARGS)

gpu-test: $(VENV)/.installed-test  ## run the tests that need an NVIDIA GPU (install an extra first: pip install -e .[cuda13])
	$(RUN)/python -m pytest -q -m gpu $(ARGS)

sanitize: $(VENV)/.installed-test  ## run a small pass of each kernel under compute-sanitizer, on a machine with a GPU and the CUDA toolkit
	$(RUN)/python -m bench.sanitize $(ARGS)

lint: $(VENV)/.installed-dev  ## check style and formatting
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

format: $(VENV)/.installed-dev  ## rewrite the sources as lint wants them
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

types: $(VENV)/.installed-dev  ## check types
	$(RUN)/pyright

clean:  ## remove the environment and the caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

$(RUN)/python:
	python=$$(.ci/find-python) && "$$python" -m venv $(VENV)

$(VENV)/.installed-base: pyproject.toml | $(RUN)/python
	$(RUN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(RUN)/python
	$(RUN)/python -m pip install --quiet -e '.[test]'
	touch $@ $(VENV)/.installed-base

$(VENV)/.installed-dev: pyproject.toml | $(RUN)/python
	$(RUN)/python -m pip install --quiet -e '.[dev]'
	touch $@ $(VENV)/.installed-test $(VENV)/.installed-base
