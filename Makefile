# `make demo` and `make test` need python 3.11 or newer and a package index, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DIFFUSERS_VERSIONS := 0.36.0 0.39.0 0.42.1
# Ranks share the cores, so each keeps to one thread. The hub is never asked.
export OMP_NUM_THREADS := 1
export HF_HUB_OFFLINE := 1

.PHONY: help install test lint format demo test-versions clean

help:
	@echo "make demo           one port from command to picture, on two processes of this machine"
	@echo "make test           the whole suite"
	@echo "make lint           ruff, black, mypy, porter check"
	@echo "make format         let ruff and black rewrite what they can"
	@echo "make test-versions  prove both PixArt ports on diffusers $(DIFFUSERS_VERSIONS)"
	@echo "make clean          remove the environments and everything built"

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: $$($(PYTHON) --version), expected Python 3.11 or newer; name one: make PYTHON=python3.11" >&2; exit 2; }
	@echo "==> Making the virtual environment $(VENV) from constraints.txt"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq --constraint constraints.txt --editable '.[dev]'
	@touch $@

test: install
	@echo "==> Running the whole suite"
	@$(BIN)/pytest --numprocesses 2 --dist loadfile

lint: install
	@echo "==> ruff, black, mypy"
	@$(BIN)/ruff check .
	@$(BIN)/black --check --quiet .
	@$(BIN)/mypy

format: install
	@$(BIN)/ruff check --fix .
	@$(BIN)/black .

clean:
	rm -rf $(VENV) .venvs demo dist .mypy_cache .pytest_cache .ruff_cache
