# The two set-up commands: `make demo` and `make test`. Each makes its own virtual environment in a fresh clone.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
MULTIFID := $(BIN)/multifid

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(shell grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,tensorboard,test,check]'
	touch $@

.PHONY: demo test test-full test-gpu bench bench-short bench-gpu docs lint check format clean

demo: demo/elements.png      ## five small sources, stores, and the paper's two tables, in demo/
	$(MULTIFID) study configs/demo.yaml

FILES  := demo/files/sources.json
STORES := $(addprefix demo/stores/,ani1x qm7x transition1x mptrj alexandria)

$(FILES): | $(VENV)/installed
	$(MULTIFID) sample demo/files

demo/stores/ani1x: | $(FILES)
	$(MULTIFID) prepare ani1x demo/files/ani1x.h5 --level-of-theory GFN2-xTB --out $@

demo/stores/qm7x: | $(FILES)
	$(MULTIFID) prepare qm7x demo/files/qm7x.hdf5 --level-of-theory IPEA1-xTB --out $@

demo/stores/transition1x: | $(FILES)
	$(MULTIFID) prepare transition1x demo/files/transition1x.h5 --level-of-theory GFN1-xTB --out $@

demo/stores/mptrj: | $(FILES)
	$(MULTIFID) prepare mptrj demo/files/mptrj.json --level-of-theory "GFN1-xTB, Gamma only" --out $@

demo/stores/alexandria: | $(FILES)
	$(MULTIFID) prepare alexandria demo/files/alexandria.json.bz2 demo/files/alex_go.json.bz2 --level-of-theory "GFN1-xTB, Gamma only" --out $@

demo/elements.png: $(STORES)
	$(MULTIFID) stats $(STORES) --figure $@

# Two tests at a time; those that start several processes themselves one after the other.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup
# A thread for each, unless told: threads of several tests on the same cores only wait for each other.
test test-full: export OMP_NUM_THREADS := $(or $(OMP_NUM_THREADS),1)
# Tests start many processes: each would compile the package and torch's own files again.
unexport PYTHONDONTWRITEBYTECODE

test: $(VENV)/installed      ## the test suite: a representative of every setting
	$(PYTEST) -m "not full"

test-full: $(VENV)/installed ## all other settings: encoders x optimizers x precisions x forces x placements
	$(PYTEST) -m full

test-gpu: $(VENV)/installed  ## steps, lists and runs on every accelerator here against the CPU; says what it skips and why
	$(BIN)/python -m pytest tests/gpu -rs

# Stores of published data, if you have them (ANI-1x and MPtrj, docs/formats.md): otherwise of molecules of 9 to 26 atoms
# and crystals of 16 and 24, made in some minutes.
MOLECULES ?= demo/larger/ani1x
CRYSTALS  ?= demo/larger/mptrj

demo/larger/files/sources.json: | $(VENV)/installed
	$(MULTIFID) sample demo/larger/files --larger --structures 128

demo/larger/ani1x: | demo/larger/files/sources.json
	$(MULTIFID) prepare ani1x demo/larger/files/ani1x.h5 --level-of-theory GFN2-xTB --out $@

demo/larger/mptrj: | demo/larger/files/sources.json
	$(MULTIFID) prepare mptrj demo/larger/files/mptrj.json --level-of-theory "GFN1-xTB, Gamma only" --out $@

bench: $(VENV)/installed | $(MOLECULES) $(CRYSTALS)  ## training steps beside the plain published form, on stores of both
	$(BIN)/python benchmarks/training.py --molecules $(MOLECULES) --crystals $(CRYSTALS)

bench-short: $(VENV)/installed | $(MOLECULES)  ## the same for a small model; fails where the ratio has dropped
	$(BIN)/python benchmarks/training.py --molecules $(MOLECULES) --short

bench-gpu: $(VENV)/installed     ## eight minutes on a GPU: its tests, speed, memory and a profile, in benchmarks/results-gpu.md
	$(BIN)/python benchmarks/gpu.py

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/installed-docs ## the site of docs/, in site/; fails at a link or an anchor that leads nowhere
	$(BIN)/mkdocs build --strict

format: $(VENV)/installed
	$(BIN)/ruff format src tests
	$(BIN)/ruff check --fix src tests

lint: $(VENV)/installed      ## format, lint, types
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy

check: lint test             ## what a change must pass

clean:
	rm -rf $(VENV) demo
