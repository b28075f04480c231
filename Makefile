# Two commands do everything on a fresh machine with Python 3.11 or newer: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo serve test portable full-size clean

demo: $(READY)  ## one picture through the vendor's SDK, over the real API
	@$(BIN)/python -m demo.demo

serve: $(READY)  ## the API on http://127.0.0.1:8000 until Ctrl-C
	@$(BIN)/imaged serve

test: $(READY)  ## everything that CI checks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy & types=$$!; $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder && wait $$types

# Pinned versions; torch's pin finds the CPU build where one lies at hand.
$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV): a few minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=23.2"
	$(BIN)/python -m pip install --progress-bar on --constraint constraints.txt --editable ".[dev]"
	@touch $(READY)

portable: $(READY)  ## the tests that compare numbers, under older processors' instructions: 45 minutes
	$(BIN)/python -m tests.portable

full-size: $(READY)  ## a checkpoint of SDXL's size against diffusers: 24 GB of memory, half an hour
	$(BIN)/python -m bench full

clean:  ## remove what was set up and built
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis
