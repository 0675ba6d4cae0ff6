# Two commands on a fresh machine: `make quickstart` and `make test`. Both set themselves up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
PACKAGES := -e packages/core -e packages/builder -e packages/executor -e packages/llm
# One more than there are cores: some tests only wait. Each takes tests that are neighbours, which share fixtures.
WORKERS ?= $(shell echo $$(( $$(nproc 2>/dev/null || echo 2) + 1 )))
MANIFESTS := constraints.txt requirements-dev.txt $(wildcard packages/*/pyproject.toml)

.PHONY: quickstart test test-gpu lint fmt bench clean

quickstart: $(VENV)/.runtime
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not gpu" -n $(WORKERS) --dist worksteal

# pytest itself would skip everything where there is no GPU, and call that a success.
WHY_NO_GPU := import sys; from lamella_core.device import why_no_cuda as why; \
	sys.exit(why() and f"no CUDA device to test on: {why()}")

test-gpu: $(VENV)/.dev
	@$(BIN)/python -c '$(WHY_NO_GPU)'
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/size_report.py

fmt: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.runtime
	$(BIN)/python benchmarks/compare_transformers.py

$(VENV)/.runtime: $(MANIFESTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(PACKAGES)
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
