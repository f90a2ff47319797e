PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two threads that wait for each other on a busy machine are slower than one; passive waiting avoids the worst of it.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint types clean

demo: $(VENV)/.installed
	$(BIN)/trimllm demo $(if $(DOMAIN),--domain $(DOMAIN)) $(if $(SEED),--seed $(SEED))

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs
