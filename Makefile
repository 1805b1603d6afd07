# Two commands do everything: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: quickstart test lint format clean
.DEFAULT_GOAL := quickstart

quickstart: $(VENV)/.cpu ## Install, run the main job on the embedded data, and say where the report is.
	$(BIN)/deploycnn compress quickstart

test: $(VENV)/.dev lint ## Install with test extras, lint, type-check and run the tests.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@if [ -x $(BIN)/hadolint ]; then $(BIN)/hadolint docker/*.Dockerfile; \
	  else echo "hadolint has no wheel for this platform: Dockerfiles are not linted" >&2; fi

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.cpu: pyproject.toml
	@$(MAKE) --no-print-directory $(VENV)/bin/python
	$(PIP) install --quiet --editable ".[cpu,openvino]"
	@touch $@

$(VENV)/.dev: pyproject.toml
	@$(MAKE) --no-print-directory $(VENV)/bin/python
	$(PIP) install --quiet --editable ".[dev]"
	@touch $@ $(VENV)/.cpu

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "deploycnn needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

clean: ## Remove the virtual environment and caches; runs are kept.
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist
