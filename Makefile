# Everything a clone can do, each in one command; the first one makes the virtual environment and builds the package.
#
#   make demo      train a network on handwritten digits and save a picture of it in out/
#   make test      run the test suite
#   make bench     measure fastce against fastce.reference and print the table of ratios
#   make compare   measure fastce against other libraries
#   make options   measure what each option, target kind and further function costs
#   make torture   run the long tests for an hour or two (ARGS="--quick", ARGS="--only soak.py"); their results go to
#                  tests/README.md
#   make lint      check the style of the Python and Cython sources and the types
#   make clean     remove all that was made
#
# PYTHON=python3.12 picks another interpreter for a new .venv.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Test processes at once; plain pytest runs one after the other.
SIDE_BY_SIDE := --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: demo test bench compare options torture lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed-demo
	$(RUN) examples/train_digits.py --out out

test: $(VENV)/installed-test
	$(RUN) -m pytest $(SIDE_BY_SIDE)

bench: $(VENV)/installed-bench
	mkdir -p benchmarks/results
	$(RUN) -m pytest benchmarks --benchmark-json=benchmarks/results/reference.json
	$(RUN) -m benchmarks.table

compare: $(VENV)/installed-compare
	$(RUN) -m benchmarks --readme README.md

options: $(VENV)/installed-compare
	$(RUN) -m benchmarks.options

torture: $(VENV)/installed-torture
	$(RUN) tests/torture/run.py $(ARGS)

lint: $(VENV)/installed-lint
	$(RUN) -m ruff check
	PATH="$(VENV)/bin:$$PATH" cython-lint fastce
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	rm -f fastce/_kernels/*.so
	find benchmarks examples fastce tests tools -name __pycache__ -prune -exec rm -rf {} +

# Stamp files, so that a second call is quick. The package is built once, in place, and again only after a change of what
# decides the build; Python files are used where they lie. An extra then adds only its packages: for pip the installed
# fastce satisfies "fastce[demo]" already.
BUILD_FILES := setup.py pyproject.toml $(wildcard fastce/_kernels/*.pyx fastce/_kernels/*.pxd fastce/_kernels/*.h)

$(VENV)/installed-%: $(VENV)/built
	$(RUN) -m pip install "fastce[$*]"
	touch $@

$(VENV)/built: $(BUILD_FILES) | $(RUN)
	$(RUN) -m pip install --editable .
	touch $@

$(RUN):
	$(PYTHON) -m venv $(VENV)
