PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# Two threads that wait for each other on a busy machine are slower than one; passive waiting avoids the worst of it.
export OMP_WAIT_POLICY ?= PASSIVE

# The oldest release we support, one between, and the newest (the one in constraints.txt).
MATRIX ?= 5.5.0 5.17.0 $(shell sed -n 's/^transformers==\([0-9.]*\).*/\1/p' constraints.txt)

.PHONY: demo test test-matrix lint types clean

demo: $(VENV)/.installed
	$(BIN)/trimllm demo $(if $(DOMAIN),--domain $(DOMAIN)) $(if $(SEED),--seed $(SEED))

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

test-matrix: $(MATRIX:%=test-transformers-%)

test-transformers-%: .venv-transformers-%/.installed
	OMP_NUM_THREADS=1 .venv-transformers-$*/bin/python -m pytest -n $(WORKERS) -rs \
		tests/test_surgery.py tests/test_surgery_families.py tests/test_export.py

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

.PRECIOUS: .venv-transformers-%/.installed
.venv-transformers-%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-transformers-$*
	sed -E '/^(transformers|huggingface_hub|tokenizers)==/d' constraints.txt > .venv-transformers-$*/constraints.txt
	.venv-transformers-$*/bin/python -m pip install --quiet --constraint .venv-transformers-$*/constraints.txt torch
	.venv-transformers-$*/bin/python -m pip install --quiet --constraint .venv-transformers-$*/constraints.txt \
		--editable '.[dev]' transformers==$*
	touch $@

clean:
	rm -rf $(VENV) .venv-transformers-* runs
