PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Processes of the tests: one per core, four at most.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN || echo 2); echo $$((n < 4 ? n : 4)))
# Two threads that wait for each other on a busy machine are slower than one; passive waiting avoids the worst of it.
export OMP_WAIT_POLICY ?= PASSIVE
# Tests start dozens of processes, which would each compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

# The oldest release we support, one between, and the newest (the one in constraints.txt).
MATRIX ?= 5.5.0 5.17.0 $(shell sed -n 's/^transformers==\([0-9.]*\).*/\1/p' constraints.txt)

.PHONY: demo test test-matrix check-llamacpp lint types clean family-table

demo: $(VENV)/.installed
	$(BIN)/trimllm demo $(if $(DOMAIN),--domain $(DOMAIN)) $(if $(SEED),--seed $(SEED))

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-matrix: $(MATRIX:%=test-transformers-%)

test-transformers-%: .venv-transformers-%/.installed
	OMP_NUM_THREADS=1 .venv-transformers-$*/bin/python -m pytest -n $(WORKERS) -rs \
		tests/test_surgery.py tests/test_surgery_families.py tests/test_export.py
	OMP_NUM_THREADS=1 .venv-transformers-$*/bin/python tests/family_table.py

# Not part of the tests: llama-cpp-python has no wheels, and its build takes 10 minutes on 2 cores.
check-llamacpp: $(VENV)/.installed-dev .venv-llamacpp/.installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/llamacpp.py --engine .venv-llamacpp/bin/python

# Its C++ is optimized little, to build sooner; the kernels of matrix products are C, and keep -O3.
LLAMACPP_FLAGS := '-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG' -DLLAVA_BUILD=OFF
.venv-llamacpp/.installed:
	$(PYTHON) -m venv .venv-llamacpp
	echo 'set(LLAMA_BUILD_COMMON OFF)' > .venv-llamacpp/library.cmake
	CMAKE_BUILD_PARALLEL_LEVEL=$(WORKERS) \
		CMAKE_ARGS="$(LLAMACPP_FLAGS) -DCMAKE_PROJECT_llama.cpp_INCLUDE=$(CURDIR)/.venv-llamacpp/library.cmake" \
		.venv-llamacpp/bin/python -m pip install --quiet --constraint constraints.txt \
		--no-binary llama-cpp-python llama-cpp-python==0.3.36
	touch $@

family-table: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/family_table.py

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
		--editable . pytest pytest-xdist transformers==$*
	touch $@

# Of runs/ only what `make demo` writes: the rest is the user's.
clean:
	rm -rf $(VENV) .venv-transformers-* .venv-llamacpp runs/demo
