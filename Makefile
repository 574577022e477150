# `make demo` and `make test` are all a fresh machine needs: Python 3.11 or newer, and make.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
BUILD  := build
QUICK  := not gpu and not slow
PROMPT ?= a large red circle on the left, a small blue square in the top right and a green star in the bottom right, on a white background

.PHONY: demo test test-runtime test-rest lint format quality gpu clean

demo: $(BUILD)/shapes.bundle/bundle.json ## export the shipped checkpoint, make a picture, say where it is
	@$(BIN)/sd-run $(BUILD)/shapes.bundle "$(PROMPT)" --guidance-scale 3 --seed 7 --output $(BUILD)/demo.png
	@echo "The picture: $(CURDIR)/$(BUILD)/demo.png"

test: $(VENV)/.stamp ## lint, types and tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@echo "Tests run in two halves at once; each shows what it found when it ends."
	@$(MAKE) --no-print-directory --jobs 2 --keep-going --output-sync=target test-runtime test-rest

# Halves of about one length, at once: they share nearly no bundle, so little is exported twice.
test-runtime: $(VENV)/.stamp
	$(BIN)/pytest -m "$(QUICK)" tests/runtime

test-rest: $(VENV)/.stamp
	$(BIN)/pytest -m "$(QUICK)" --ignore tests/runtime

lint: $(VENV)/.stamp
	$(BIN)/pre-commit run --all-files

format: $(VENV)/.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(BUILD)/shapes.bundle/bundle.json ## how well the shipped checkpoint obeys 200 held-out captions
	$(BIN)/sd-bench quality $(BUILD)/shapes.bundle

$(BUILD)/shapes.bundle/bundle.json: $(VENV)/.stamp
	@$(BIN)/sd-export --model benchmarks/shapes/checkpoint --output $(BUILD)/shapes.bundle

$(VENV)/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("$(PYTHON) is older than Python 3.11. Name a newer one: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[cpu,export,bench,dev]"
	@touch $@

gpu: $(VENV)/.stamp ## all that only an NVIDIA GPU can tell, into build/gpu: see benchmarks/gpu.py
	$(BIN)/python benchmarks/gpu.py $(BUILD)/gpu

clean:
	rm -rf $(BUILD) $(VENV)
