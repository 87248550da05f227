# Every target but `clean` first sees to it that .venv is complete; that is a matter of
# milliseconds unless pyproject.toml, the pins or TORCH changed.

PYTHON  ?= python3
TORCH   ?= torch==2.13.0
WORKERS ?= 2
ARGS    ?=

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --disable-pip-version-check --no-input --quiet --quiet
PINS := requirements/dev.txt
# TORCH is part of the stamp's name, so that asking for another one installs it.
STAMP := $(VENV)/.installed-$(shell printf '%s' '$(TORCH)' | cksum | cut -d ' ' -f 1)

.PHONY: help setup test test-fast lint types docs format compare clean

help:  ## show this list (the default)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Variables: ARGS (passed to pytest or bench/compare.py), TORCH=$(TORCH),"
	@echo "PYTHON=$(PYTHON) (makes the environment), WORKERS=$(WORKERS) (test processes)"

setup: $(STAMP)  ## create .venv and install everything into it

# torch comes before all that depends on it: left to find torch themselves, those packages bring
# the newest build with several GB of CUDA libraries.
$(STAMP): pyproject.toml $(PINS)
	@rm -f $(VENV)/.installed-*
	@test -x $(BIN)/pip || { echo "setup: creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "setup: installing $(TORCH) (a few minutes when it is downloaded)"
	@$(PIP) install --constraint $(PINS) "$(TORCH)"
	@echo "setup: installing the pinned requirements of $(PINS)"
	@$(PIP) install --requirement $(PINS)
	@echo "setup: installing fxckpt, editable"
	@$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@
	@echo "setup: done"

test: setup  ## run all tests, e.g. make test ARGS="tests/test_split.py -k views"
	@echo "test: pytest in $(WORKERS) processes"
	@$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-fast: setup  ## run the tests that are not marked slow
	@echo "test-fast: pytest in $(WORKERS) processes, without the slow tests"
	@$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

lint: setup  ## check style and formatting
	@echo "lint: ruff check, ruff format --check"
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .

types: setup  ## check the types of fxckpt/
	@echo "types: mypy"
	@$(BIN)/python -m mypy

docs: setup  ## build the documentation into build/site
	@echo "docs: mkdocs build --strict"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs --quiet build --strict

format: setup  ## format, and fix what can be fixed
	@$(BIN)/python -m ruff check --fix .
	@$(BIN)/python -m ruff format .

compare: setup  ## compare memory, time and gradients with the peers, e.g. ARGS="--model bert"
	@echo "compare: bench/compare.py $(ARGS)"
	@$(BIN)/python bench/compare.py $(ARGS)

clean:  ## remove .venv, caches and build results
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
