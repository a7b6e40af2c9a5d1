# Everything happens in .venv, which the first target that needs it creates. PYTHON chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
# Tests start thousands of processes; each would compile every module anew if bytecode were not kept.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test test-unit test-all test-touched coverage soak gpu lint types docs bench bench-smoke clean

run: .venv/installed
	$(BIN)/fedexec run $(ARGS)

# Four at once on two cores, because tests wait a third of their time.
PYTEST = $(BIN)/python -m pytest -n 4 --dist loadscope --no-loadscope-reorder

# The suites once on each backend, and one case of each other promise.
test: .venv/installed
	$(PYTEST) -m "not thorough" $(ARGS)

# What starts no process: seconds.
test-unit: .venv/installed
	$(BIN)/python -m pytest -q -m unit $(ARGS)

test-all: .venv/installed
	$(PYTEST) $(ARGS)

# The thorough tests of what the last commit touches, or what has changed since the commit BASE.
test-touched: .venv/installed
	touched=$$($(BIN)/python tests/touched.py) && \
	    if [ -n "$$touched" ]; then $(PYTEST) -m thorough $$touched $(ARGS) || [ $$? = 5 ]; fi  # 5: they have none

# Lines and branches that `make test` runs in the callers' processes; workers are not followed. Some tests are left
# out: coverage itself fails where sys.path has objects that are no text, it imports modules that fedexec does not,
# and it hides a Ctrl+C that comes while it starts.
coverage: .venv/installed
	$(PYTEST) -m "not thorough" --cov $(ARGS) -k "not import_ignores and not nothing_heavy and not imported_is_quiet"

soak: .venv/installed
	$(BIN)/python tests/faults/soak.py
	$(BIN)/python tests/faults/kills.py
	$(BIN)/python tests/faults/rounds.py

gpu: .venv/installed
	$(BIN)/python -m pytest tests/gpu $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python bench/figures.py --check

types: .venv/installed
	$(BIN)/mypy
	for each in tests/conftest.py tests/*/conftest.py bench/conftest.py; do $(BIN)/mypy $$each || exit 1; done

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet $(ARGS)

bench: .venv/installed
	$(BIN)/python -m pytest bench $(ARGS)

bench-smoke: .venv/installed
	$(BIN)/python -m pytest bench --mode smoke -q $(ARGS)

clean:
	rm -rf .venv site .tox .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo,dev]'
	touch $@

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@
