# Everything is set up by the target that needs it: Python >= 3.11, git and make are enough.
PYTHON ?= python3
BIN := .venv/bin
PINNED := --constraint tests/pinned.txt  # versions that are known to pass, whatever has been released since
# small tests of every layer, for environments other than .venv
CORE := $(patsubst %,tests/test_%.py,config kernels trust_region inputs cluster streaming maps cli)

.PHONY: demo test test-slow test-oldest test-newest notebooks wheel figures damage failures bench bench-groups bench-long mutants mutants-draw docs live-pictures lint clean
demo: .venv/ready          ## simulate, store, fit 53 parameters, check, draw
	$(BIN)/dask nlsq demo

test: .venv/ready          ## all tests but the long ones and the code of the pages, in two processes: 8 minutes
	$(BIN)/python -m pytest -m "not slow and not pages" --numprocesses 2 --dist loadfile

test-slow: .venv/ready     ## only the long ones
	$(BIN)/python -m pytest -m slow

notebooks: .venv/ready      ## run the notebooks from clean
	$(BIN)/python -m pytest tests/test_notebooks.py --durations=0

wheel: export SOURCE_DATE_EPOCH ?= $(or $(shell git log -1 --format=%ct 2>/dev/null),1580601600)
wheel: export PIP_CONSTRAINT = $(CURDIR)/tests/pinned.txt
wheel:                     ## build sdist, and the wheel twice to the same bytes, install it in a fresh environment, run tests of it there
	rm -rf dist
	$(PYTHON) -m venv dist/fresh
	dist/fresh/bin/python -m pip install --quiet build
	dist/fresh/bin/python -m build --outdir dist
	mkdir dist/copy && tar -x -m -f dist/*.tar.gz -C dist/copy --strip-components 1  # with other times
	umask 077 && dist/fresh/bin/python -m build --wheel --outdir dist/again dist/copy
	cmp dist/*.whl dist/again/*.whl
	dist/fresh/bin/python -m pip install --quiet "$$(ls dist/*.whl)[test]"
	cp -r tests benchmarks pyproject.toml dist/fresh
	cd dist/fresh && bin/python -m pytest -m "not slow" $(CORE)

test-oldest:               ## tests of the core with the oldest versions of what it needs
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --editable ".[test]" --constraint tests/oldest.txt
	.venv-oldest/bin/python -m pytest -m "not slow" $(CORE)

test-newest:               ## tests of the core with the newest versions, which go to tests/pinned.txt when all tests pass
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --editable ".[test,docs]" build hatchling
	.venv-newest/bin/python -m pytest -m "not slow" $(CORE)
	.venv-newest/bin/python -m pip freeze --exclude-editable > .venv-newest/pinned.txt

figures: .venv/ready       ## print the accuracy figures of docs/benchmarks.md, and those of convergence
	$(BIN)/python -m tests.accuracy
	$(BIN)/python -m tests.convergence

damage: .venv/ready        ## flip 500 bits in files of every kind that the package writes, and open hostile ones: two minutes
	$(BIN)/python -m tests.damage
	$(BIN)/python -m pytest -m hostile

bench: .venv/ready          ## time everything against SciPy, optimistix and plain JAX
	$(BIN)/python -m pip install --quiet optimistix
	$(BIN)/python -m benchmarks.run

bench-groups: .venv/ready   ## grouped fits against SciPy, and the figures that they are to reach: 20 minutes, 2 GB of disk
	$(PYTHON) -m venv .venv-pyglotaran
	.venv-pyglotaran/bin/python -m pip install --quiet pyglotaran
	$(BIN)/python -m benchmarks.groups

bench-long: .venv/ready     ## maps against xarray, peak memory against its prediction, stores of 2 GB: 45 minutes, 3 GB of disk
	$(BIN)/python -m benchmarks.maps
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.streaming

failures: .venv/ready      ## full disks, Ctrl-C, kill -9, 2000 fits on one cluster: what is lost? An hour
	$(BIN)/python -m benchmarks.failures

mutants: .venv/ready       ## does a test notice? 66 changes of one token in the core, two at a time: an hour at most
	$(BIN)/python -m tests.mutants

mutants-draw:              ## other changes in place of those whose line is not in the code any more
	$(PYTHON) -m venv .venv-mutants
	.venv-mutants/bin/python -m pip install --quiet cosmic-ray
	.venv-mutants/bin/python -m tests.mutants --draw

docs: .venv/docs live-pictures ## run the code of the pages, and build them in docs/_build, with warnings as errors
	$(BIN)/python -m pytest -m "pages and not slow"
	$(BIN)/python -m benchmarks.gallery
	$(BIN)/sphinx-build -W --keep-going -n -q -b html docs docs/_build

live-pictures: .venv/ready  ## the live page in each of its states; needs a Chromium, and leaves them without one
	$(BIN)/python -m tests.live_page

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

.venv/ready: pyproject.toml tests/pinned.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test]" $(PINNED)
	touch $@

.venv/docs: .venv/ready
	$(BIN)/python -m pip install --quiet --editable ".[docs]" $(PINNED)
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-mutants .venv-pyglotaran dist docs/_build docs/reference/generated
