# `make train` and `make test` do all the set-up, in a virtual environment inside this clone.
# Another torch build (a GPU's, say): make install TORCH='torch==<version>' with pip's usual settings; see the README.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
TORCH ?= $(shell grep '^torch==' constraints.txt)
BIN := .venv/bin

.PHONY: install train test test-all bench docs lint clean

install: .venv/installed

# torch first and by itself: resolved together with the rest, pip may prefer a newer build than the one asked for
.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 to 3.13 found; give one: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	grep -v '^torch==' constraints.txt > .venv/constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint .venv/constraints.txt "$(TORCH)"
	$(BIN)/pip freeze | grep '^torch==' >> .venv/constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint .venv/constraints.txt --editable '.[train,hf,dev]'
	touch $@

train: install
	$(BIN)/moesaic train $(ARGS)

test: install
	$(BIN)/python -m pytest -m "not slow" --durations=25 $(ARGS)

test-all: install
	$(BIN)/python -m pytest -m slow --durations=25 $(ARGS)

bench: install
	$(BIN)/moesaic bench $(ARGS)

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

.venv/docs: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint .venv/constraints.txt --editable '.[docs]'
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .cache build site .mypy_cache .pytest_cache .ruff_cache .hypothesis
