# `make ablation` and `make test` install what they need into .venv and run; nothing else has to be done first.
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: ablation test fast check bench clean

ablation: $(READY)
	$(BIN)/python sweeps/predictor_ablation.py --cluster local --scale smoke

test: $(READY)
	$(BIN)/pytest -n $(JOBS) --dist loadfile

fast: $(READY)
	$(BIN)/pytest -n $(JOBS) --dist loadfile -m "not slow"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/audit.py

bench: $(READY)
	for benchmark in tests/benchmarks/[!_]*.py; do $(BIN)/python $$benchmark || exit 1; done

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) runs
