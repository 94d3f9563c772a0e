# make quickstart [MINUTES=10] | doctor | test | test-faults | lint | docs | bench: each target first installs the
# project into .venv.
# PYTHON sets the interpreter.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/.halftone-installed

# One process for each core, with one thread each (tests/conftest.py). Each begins with a part of the files, whose
# fixtures its tests share, and an idle one takes tests from the others.
PYTEST := $(RUN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

.PHONY: setup doctor quickstart quickstart-tiny test test-slow test-long test-faults lint docs bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Halftone needs Python 3.11 or later, and $(PYTHON) is older: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@echo "Installing into $(VENV) (a few minutes, once) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(RUN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(STAMP)

doctor: $(STAMP)
	@$(RUN)/python training/doctor.py

quickstart: $(STAMP)
	@$(RUN)/python training/quickstart.py $(if $(MINUTES),--minutes $(MINUTES))

quickstart-tiny: $(STAMP)
	@$(RUN)/python training/quickstart.py --tiny true

test: $(STAMP)
	$(PYTEST) -m "not slow and not long"

test-slow: $(STAMP)
	$(PYTEST) -m "slow and not long"

test-long: $(STAMP)
	$(PYTEST) -m long

# Hours: produces every fault in its long form and writes docs/reliability.md. FAULTS names some of them.
test-faults: $(STAMP)
	PYTHONPATH=. $(RUN)/python -m tests.faults $(FAULTS)

lint: $(STAMP)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports

# The documentation site, in site/. A warning, such as a link without a target, is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(RUN)/mkdocs build --strict --quiet

# Ten minutes on two cores: writes docs/benchmarks.md. BENCH has flags such as --only '[loop]'.
bench: $(STAMP)
	$(RUN)/python training/benchmarks/run.py $(BENCH)

clean:
	rm -rf $(VENV) build *.egg-info
