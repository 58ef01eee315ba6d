# Everything runs in .venv, made on first use from constraints.txt.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := examples/stdlib.toml
# Programs that the lab calls (`ip`, `tc`), the browser in which reports are tested, and MPI's launchers, by which runs are
# started in tests; nothing else needs them, and those tests are skipped without them.
DEBIAN_PACKAGES := iproute2 chromium openmpi-bin mpich openssh-client

.PHONY: demo test test-all test-slurm check bench clean setup package packages docs

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "thinwire needs Python 3.11 or newer; set PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

# Install what the lab and those tests need, where that can be done without asking.
packages:
	@for program in ip tc chromium mpirun.openmpi mpiexec.hydra; do PATH="$$PATH:/usr/sbin:/sbin" command -v $$program >/dev/null || missing=1; done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -qq && apt-get install -y -qq $(DEBIAN_PACKAGES); \
	else echo "the lab and some tests need $(DEBIAN_PACKAGES): sudo apt-get install $(DEBIAN_PACKAGES); those tests are skipped until then" >&2; fi

# Train a small model on the interpreter's own source, on two local ranks; again: shows or resumes that run.
# `make demo FRESH=1` puts the old run aside and starts anew.
demo: $(READY)
	$(BIN)/thinwire train $(DEMO) $(if $(FRESH),--fresh)

# How many test files run at a time; `make test WORKERS=0` runs one after the other.
WORKERS ?= 3
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --durations=20

# Every promise once.
test: $(READY)
	$(PYTEST) -m 'not slow and not slurm'

# Whole grids, whole studies, other starters, every page in a browser, every command of docs/ and a Slurm too.
test-all: $(READY)
	$(PYTEST)
	$(MAKE) test-slurm

# Job scripts on a real Slurm, started for the tests on this machine (installed first if need be; needs root).
test-slurm: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slurm

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Build wheel and sdist; install the wheel, with what it depends on, in an empty environment; run the demo there.
package: $(READY)
	rm -rf build/package && mkdir -p build/package/empty
	$(BIN)/python -m build --no-isolation --outdir build/package/dist .
	$(PYTHON) -m venv build/package/venv
	build/package/venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build/package/dist/*.whl
	cd build/package/empty && ../venv/bin/thinwire train ../../../$(DEMO) --set run.steps=30

# The documentation site, in site/; a warning is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/loop_overhead.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/data_prepare.py

clean:
	rm -rf $(VENV) runs build dist site src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
