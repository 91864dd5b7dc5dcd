# `make demo` and `make test` set everything up by themselves: a virtual environment in .venv from the lock file.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

# Ray keeps repeated lines back and prints them when it leaves: after pytest's last line.
test test-fast: export RAY_DEDUP_LOGS = 0

.PHONY: demo test test-fast lint lock clean

demo: $(INSTALLED)
	$(BIN)/tilestream demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Debian and Ubuntu ship Python without venv: root installs it, anybody else is told.
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$$($(PYTHON) --version) is too old: Python 3.11 or newer is needed, e.g. make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		test "$$(id -u)" = 0 || { echo "Python's venv module is missing: sudo apt-get install python3-venv" >&2; exit 2; }; \
		apt-get update -q && apt-get install -qy python3-venv; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (some 6 GB, mostly torch: a few minutes)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# The versions that the tests ran with, for all platforms and Pythons; needs `pip install uv`.
lock:
	uv pip compile -q --universal --python-version 3.11 --extra dev --no-header --no-annotate --no-emit-index-url \
		pyproject.toml -o requirements.lock

clean:
	rm -rf .venv build *.egg-info demo-output .pytest_cache .ruff_cache .hypothesis
