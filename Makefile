# make demo   predict the paper's 27B model from shipped measurements; no GPU, no torch
# make test   everything that CI runs
# make docs   the site of the documents, in out/site
#
# Both create $(VENV) and install into it what they need. PYTHON picks the interpreter (3.11+).

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test docs lint types layers wheel pytest clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -5

demo: $(VENV)/.installed
	$(BIN)/mhcplan predict mhc-27b --pp 8 --ep 8 --n 4 --microbatches 64 --schedule dualpipe --out out/demo

docs: $(VENV)/.installed-test
	$(BIN)/mkdocs build --strict

test: lint types layers wheel pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/pyright --project pyproject.toml --pythonpath $(BIN)/python

layers: $(VENV)/.installed-test
	$(BIN)/lint-imports --no-logo

wheel: $(VENV)/.installed-test
	$(BIN)/python .ci/check_wheel.py

pytest: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt --editable .
	@touch $@

# torch's CUDA build demands a triton of its own; where pip finds that build, its triton is taken.
$(VENV)/.installed-test: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt --editable '.[test]' \
	  || $(PIP) --editable '.[test]'
	@touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) build dist out *.egg-info src/*.egg-info
