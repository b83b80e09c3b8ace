# `make demo` and `make test` need nothing but Python >= 3.11: both build .venv on first use.
# The constraints file is for CPU set-ups; with a GPU: make setup CONSTRAINTS=/dev/null
PYTHON ?= python3
CONSTRAINTS ?= constraints-cpu.txt
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo test lint typecheck clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
	touch $@

test: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(STAMP)
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info
