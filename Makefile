# The two set-up commands: `make demo` and `make test`. Each makes its own virtual environment in a fresh clone.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(shell grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,tensorboard,test,check]'
	touch $@

.PHONY: demo test check format clean

demo: $(VENV)/installed      ## five small sources, stores, and the paper's two tables, in demo/
	$(BIN)/python -m multifid.workflows.demo demo

test: $(VENV)/installed      ## the test suite
	$(BIN)/python -m pytest

format: $(VENV)/installed
	$(BIN)/ruff format src tests
	$(BIN)/ruff check --fix src tests

check: $(VENV)/installed     ## format, lint, types, tests
	$(BIN)/ruff format --check src tests
	$(BIN)/ruff check src tests
	$(BIN)/mypy
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) demo
