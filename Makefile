# make demo   install into .venv and look inside the bundled model
# make test   install what tests need, then everything that is checked: lint, format, types, tests
#
# A machine without a GPU saves gigabytes with
#     make demo TORCH="--index-url https://download.pytorch.org/whl/cpu torch==2.13.0"

PYTHON ?= python3
VENV ?= .venv
# Installed first and by itself, so that any build of it can be chosen.
TORCH ?= torch==2.13.0
# For pytest, as in: make test PYTEST="-n 4 tests"
PYTEST ?=
# Where the demo writes its page.
HTML ?= lensbridge-demo.html

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
export HF_HUB_OFFLINE := 1

.PHONY: help demo test lint types pytest docs families site downstream remote clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

demo: $(VENV)/.installed
	$(BIN)/lensbridge demo --html $(HTML)

test: lint types pytest

lint: $(VENV)/.installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-for-tests
	$(BIN)/mypy

pytest: $(VENV)/.installed-for-tests
	$(BIN)/python -m pytest -q $(PYTEST)

# What the documents take from the code, the bundled model and benchmarks/results.
docs: $(VENV)/.installed
	$(BIN)/python docs/make_hook_points.py
	$(BIN)/python docs/make_readme.py

# The table of families: every check on every family, some minutes; and how far each is from TransformerLens 3.9.0.
families: $(VENV)/.installed-for-tests
	$(BIN)/python docs/make_comparison.py
	$(BIN)/python docs/make_families.py

# All tables and plots of benchmarks/results, and with them the README's section on speed: a quarter of an hour.
benchmarks: $(VENV)/.installed-for-tests
	$(BIN)/python benchmarks/all.py --out benchmarks/results
	$(BIN)/python docs/make_readme.py

# The site of the documents, in build/site; any warning is an error.
site: $(VENV)/.installed
	$(PIP) -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Libraries written for TransformerLens, on 3.9.0 and under the alias: an environment of their own, then some minutes.
downstream: $(VENV)/.installed-for-tests
	DOWNSTREAM_ENV=$(VENV)-downstream $(BIN)/python -m compat_tests.downstream.run

# Runs on a server, which is a stand-in for NDIF in an environment of its own that has no lensbridge.
remote: $(VENV)/.installed-for-tests $(VENV)-remote/.installed
	NDIF_PYTHON=$(abspath $(VENV)-remote/bin/python) $(BIN)/python -m pytest -q compat_tests/test_ndif_stand_in.py \
	    $(wildcard compat_tests/test_remote*.py)

$(VENV)-remote/.installed: compat_tests/ndif/requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)-remote
	$(VENV)-remote/bin/python -m pip install --disable-pip-version-check --quiet $(TORCH)
	$(VENV)-remote/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -r $<
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-downstream $(VENV)-remote build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-for-tests: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) -c constraints.txt -e ".[test,viz,dev]"
	@touch $@ $(VENV)/.installed
