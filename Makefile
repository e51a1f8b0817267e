# make demo   sets all up, runs the whole loop on bundled real data
# make test   sets all up, checks style and types, runs the tests
# make test-cluster   the tests that start a Ray cluster

VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3
export PYTHONDONTWRITEBYTECODE =

.PHONY: install demo test test-cluster lint bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("pseudolabel needs Python 3.11 or newer; set PYTHON=python3.x") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	UV_COMPILE_BYTECODE=1 VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	$(BIN)/pseudolabel demo --out demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: install lint
	$(BIN)/python -m pytest -n auto --dist worksteal

test-cluster: install
	$(BIN)/python -m pytest -m cluster

bench: install
	$(BIN)/python benchmarks/store.py
	$(BIN)/python benchmarks/annotate.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/student_views.py
	$(BIN)/python benchmarks/losses.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/plan.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/select_rows.py
	$(BIN)/python benchmarks/target_precision.py
	$(BIN)/python benchmarks/verify.py
	$(BIN)/python benchmarks/leaks.py
	$(BIN)/python benchmarks/label_budget.py

clean:
	rm -rf $(VENV) demo build dist
