# `make demo` and `make test` set everything up by themselves: a virtual environment in .venv from the lock file.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

# Ray keeps repeated lines back and prints them when it leaves: after pytest's last line.
test test-fast test-long: export RAY_DEDUP_LOGS = 0
# Ray gives its workers the lowest priority but four: beside another test on a busy machine they would come to nothing.
test test-fast test-long: export RAY_worker_niceness = 0
# Two test processes with two threads of torch each, and Ray's beside them, would wait for one another.
test test-fast test-long: export OMP_NUM_THREADS = 1

.PHONY: demo test test-fast test-long lint lock clean

demo: $(INSTALLED)
	$(BIN)/tilestream demo

# Two processes: tests that start Ray wait more than they work. In order: the few long tests of tests/e2e go first.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What takes over a minute each, one after the other: some 20 minutes and more on two cores.
test-long: $(INSTALLED)
	$(BIN)/python -m pytest -m long

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow and not long"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# Debian and Ubuntu ship Python without venv: root installs it, anybody else is told.
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$$($(PYTHON) --version) is too old: Python 3.11 or newer is needed, e.g. make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		test "$$(id -u)" = 0 || { echo "Python's venv module is missing: sudo apt-get install python3-venv" >&2; exit 2; }; \
		apt-get update -q && apt-get install -qy python3-venv; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (some 8 GB, mostly torch: some minutes)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# requirements.lock: what the tests ran with, for all platforms and Pythons. The other two are for images, with the same
# versions, with hashes and without the development tools: CUDA, and CPU, which has neither NVIDIA's libraries nor torch:
# PyTorch's own index has that for CPUs, in the version that the CUDA lock names. Needs `pip install uv`.
COMPILE := uv pip compile -q --python-version 3.11 --no-header --no-annotate --no-emit-index-url pyproject.toml
IMAGE := $(COMPILE) --python-platform x86_64-manylinux_2_28 --extra cluster --extra train -c requirements.lock --generate-hashes
lock:
	$(COMPILE) --universal --extra dev -o requirements.lock
	$(IMAGE) -o requirements-cuda.lock
	grep -oE '^(nvidia|cuda|triton)[a-z0-9-]*' requirements-cuda.lock | sed "s/$$/; sys_platform == 'none'/" > .no-cuda
	$(IMAGE) --override .no-cuda --no-emit-package torch --no-emit-package torchvision -o requirements-cpu.lock
	rm .no-cuda

clean:
	rm -rf .venv build *.egg-info demo-output .pytest_cache .ruff_cache .hypothesis
