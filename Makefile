# `make install` installs into .venv. `make ablation` and `make test` do so too where that is needed, and then run.
PYTHON ?= python3
# One more than the cores of a small machine: tests on Slurm wait as much as they compute.
JOBS ?= 3
# Tests run in random order. The seed is printed first, and `make test SEED=that` repeats the order.
SEED ?= default
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Without .pyc files each worker would compile all tests anew, for 17 seconds of a core.
unexport PYTHONDONTWRITEBYTECODE
PYTEST := $(BIN)/pytest -n $(JOBS) --dist loadgroup --randomly-seed=$(SEED) --randomly-dont-reset-seed

.PHONY: install ablation test fast nightly mutants gpu check bench clean

install: $(READY)

ablation: $(READY)
	$(BIN)/python sweeps/predictor_ablation.py --cluster local --scale smoke

test: $(READY)
	$(PYTEST) -m "not nightly"

fast: $(READY)
	$(PYTEST) -m "not slow and not nightly"

nightly: $(READY)
	$(PYTEST) -m nightly
	$(BIN)/python tests/benchmarks/learning.py --jobs 3
	$(MAKE) ablation
	$(BIN)/python tests/benchmarks/probe_agreement.py runs/predictor_ablation-smoke
	$(BIN)/python tests/benchmarks/probe.py
	$(BIN)/python tests/benchmarks/evaluations.py

mutants: $(READY)
	$(BIN)/python tests/mutants.py --jobs 2

gpu: $(READY)
	$(BIN)/python -m jobs.preflight --gpu
	$(BIN)/python tests/benchmarks/on_cuda.py

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
