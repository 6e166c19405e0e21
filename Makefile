# Needs Python 3.10 or newer and make; everything else is installed into .venv.
PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := $(VENV)/.peers
UV := $(VENV)/.uv
OTHERS := $(VENV)/.others
# Several workers with a thread pool each would fight for the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help venv browser demo test test-all test-oldest test-newest test-python lint types format bench zoo zoo-others clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(INSTALLED) ## make .venv with bayesify and its tools

$(INSTALLED): pyproject.toml bayesify/kernels/native.c
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

lint: venv ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: venv ## mypy --strict
	$(BIN)/mypy

format: venv ## let ruff fix and format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

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

clean: ## remove caches and build outputs
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find bayesify recipes tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## clean, and remove .venv
	rm -rf $(VENV) .corners
