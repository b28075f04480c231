# Two commands do everything on a fresh machine with Python 3.11 or newer: make demo, make test.
#   make PYTHON=python3.12       with another Python than python3
#   make PIP_FLAGS="..."         with more options for pip, such as another index for torch
PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal --durations=25

.PHONY: demo serve test test-slow coverage portable release full-size clean

demo: $(READY)  ## one picture through the vendor's SDK, over the real API
	@$(BIN)/python -m demo.demo

serve: $(READY)  ## the API on http://127.0.0.1:8000 until Ctrl-C
	@$(BIN)/imaged serve

test: $(READY)  ## format, lint, types and the fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy & types=$$!; $(PYTEST) -m "not slow" && wait $$types
	@$(BIN)/python -m bench check  # warns of figures that are of other code

test-slow: $(READY)  ## the other tests: full sizes, servers that are killed, training
	$(PYTEST) -m slow

coverage: $(READY)  ## which lines the fast tests run, processes included: the report's last line is the sum
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n 2 --dist worksteal -m "not slow"
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered

release: $(READY)  ## sdist and wheel into dist, if the documents' figures are of this code
	@$(BIN)/python -m bench check --strict
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist

# Whether PYTHON will do, in words that Python 2 understands too.
WANTED = imaged needs Python 3.11 or newer. If there is one: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12
define PYTHON_FITS
import sys
version = "%d.%d" % tuple(sys.version_info[:2])
if sys.version_info[:2] < (3, 11):
    sys.exit("$(PYTHON) is Python " + version + ". $(WANTED)")
try:
    import ensurepip, venv
except ImportError:
    sys.exit("$(PYTHON) cannot make environments: it has no venv or no ensurepip. On Debian and Ubuntu: "
             "apt install python" + version + "-venv")
endef
$(READY): export PYTHON_FITS := $(PYTHON_FITS)

# Pinned versions; torch's pin takes the CPU build where an index has one, see README.md.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found. $(WANTED)" >&2; exit 1; }
	@$(PYTHON) -c "$$PYTHON_FITS"
	@echo "Setting up $(VENV): a few minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade $(PIP_FLAGS) "pip>=23.2"
	$(BIN)/python -m pip install --progress-bar on --constraint constraints.txt $(PIP_FLAGS) --editable ".[dev]"
	@touch $(READY)

portable: $(READY)  ## the tests that compare numbers, under older processors' instructions: half an hour or more
	$(BIN)/python -m tests.portable

full-size: $(READY)  ## a checkpoint of SDXL's size against diffusers: 24 GB of memory, half an hour
	$(BIN)/python -m bench full

clean:  ## remove what was set up and built
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
