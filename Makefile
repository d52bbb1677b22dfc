# Everything is set up by the target that needs it: Python >= 3.11, git and make are enough.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-oldest notebooks wheel figures bench bench-long lint typecheck clean
demo: .venv/ready          ## simulate, store, fit 53 parameters, check, draw
	$(BIN)/dask nlsq demo

test: .venv/ready          ## all tests but the long ones
	$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/ready     ## only the long ones
	$(BIN)/python -m pytest -m slow

notebooks: .venv/ready      ## run the notebooks from clean
	$(BIN)/python -m pytest tests/test_notebooks.py --durations=0

figures: .venv/ready       ## print every accuracy figure that the README quotes
	$(BIN)/python -m tests.accuracy

bench: .venv/ready          ## time everything against SciPy, optimistix and plain JAX
	$(BIN)/python -m pip install --quiet optimistix
	$(BIN)/python -m benchmarks.run

bench-long: .venv/ready     ## maps against xarray, peak memory against its prediction, stores of 2 GB: 45 minutes, 3 GB of disk
	$(BIN)/python -m benchmarks.maps
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.streaming

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf .venv
