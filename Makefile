# Two commands on a fresh machine: `make demo` and `make test`. Needs Python >= 3.11 and a package index.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
PARALLEL := --numprocesses auto --maxprocesses 8 --dist loadfile
export PATH := $(CURDIR)/$(BIN):$(PATH)
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo test test-all chaos lint format docs env data clean

env: $(BIN)/.installed
$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv -c constraints.txt
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[all]' --group dev
	touch $@

data: env
	$(BIN)/dvc pull --quiet --remote assets data.dvc

demo: data  # one process serves all stages, because their imports would take most of its time
	SRPO_WARM=1 $(BIN)/python -m flows.rounds --round 002
	@$(BIN)/python -m srpo table

test: data  # one test process per core, each with one thread of computation
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" $(PARALLEL)

test-all: data
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL)

chaos: env
	$(BIN)/python -m tests.faults.chaos

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry srpo flows
	$(BIN)/codespell
	$(BIN)/mkdocs build --strict --quiet

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: env
	$(BIN)/mkdocs serve

clean:
	rm -rf rounds .srpo mlflow.db mlartifacts dvc.lock .srpo-project site
