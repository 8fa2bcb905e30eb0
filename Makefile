# make demo    set up .venv, then the whole main job on this machine, in about ten minutes
# make test    set up .venv, then all tests
# make lint    formatting, lint and types
#
# PYTHON=python3.12 chooses the interpreter (3.11 or newer), DEMO="--minutes 30" passes options to the demo,
# TESTS=tests/data chooses tests, PIP="..." passes options to pip.

PYTHON ?= python3
PIP ?=
DEMO ?=
TESTS ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt $(PIP)

.PHONY: demo test lint clean setup

demo: setup
	$(BIN)/nitscale demo $(DEMO)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(TESTS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: .venv/.installed

# torch first and alone: nothing after it may bring another one. DeepSpeed builds against it, hence no isolation.
# The stamp comes last, so that an interrupted set-up is taken up again.
.venv/.installed: pyproject.toml constraints.txt
	@echo "setting up .venv (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than 3.11; use make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv \
		|| { rm -rf .venv; echo "error: $(PYTHON) has no venv module; on Debian: apt-get install python3-venv"; exit 1; }
	$(INSTALL) setuptools wheel
	$(INSTALL) torch
	$(INSTALL) --no-build-isolation -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
