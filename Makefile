# Two commands do everything on a fresh machine with Python 3.11 or newer: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal --durations=25

.PHONY: demo serve test test-slow full-size clean

demo: $(READY)  ## one picture through the vendor's SDK, over the real API
	@$(BIN)/python -m demo.demo

serve: $(READY)  ## the API on http://127.0.0.1:8000 until Ctrl-C
	@$(BIN)/imaged serve

test: $(READY)  ## format, lint, types and the fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy & types=$$!; $(PYTEST) -m "not slow" && wait $$types

test-slow: $(READY)  ## the other tests: full sizes, servers that are killed, training
	$(PYTEST) -m slow

# Pinned versions; torch's pin finds the CPU build where one lies at hand.
$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV): a few minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=23.2"
	$(BIN)/python -m pip install --progress-bar on --constraint constraints.txt --editable ".[dev]"
	@touch $(READY)

full-size: $(READY)  ## a checkpoint of SDXL's size against diffusers: 24 GB of memory, half an hour
	$(BIN)/python -m bench full

clean:  ## remove what was set up and built
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis
