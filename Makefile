# make demo    one real training script, eager and under Twofold, side by side
# make test    lint, types, layer rules, tests
# Both make .venv first if constraints.txt or pyproject.toml changed since it was made.
# make VENV=venv-2.11 TORCH=2.11.0 venv-2.11/stamp    an environment with another PyTorch

PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; \
	done)
VENV ?= .venv
TORCH ?= 2.13.0
BIN := $(VENV)/bin

.PHONY: demo test clean
.DELETE_ON_ERROR:

demo: $(VENV)/stamp
	$(BIN)/python examples/demo.py

test: $(VENV)/stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --project pyproject.toml
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist worksteal

# torch first and by itself, so that nothing else decides which build of it is installed.
$(VENV)/stamp: constraints.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "twofold: Python 3.11 or 3.12 not found; install it, or run make PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==$(TORCH) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo
