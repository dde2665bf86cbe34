# Every target sets up all that it needs; nothing has to be installed by hand but Python 3.10+.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test tests lint format docs bench bench-quality fuzz audit compat browser clean

help:
	@echo "make demo           compress the shipped model, print a table of before and after"
	@echo "make test           lint, types and all tests"
	@echo "make lint           ruff (lint, format) and mypy"
	@echo "make format         let ruff rewrite the files"
	@echo "make docs           the documentation as a site, in site/"
	@echo "make bench          cost of calibration, search and sweep; speed of the small model"
	@echo "make bench-quality  accuracy of the small models on the real model and images"
	@echo "make fuzz           10,000 damaged folders, 10,000 random plans, 20,000 random targets"
	@echo "make audit          look the installed packages up in the advisory database"
	@echo "make compat         quick tests with the oldest and the newest versions of the libraries"
	@echo "make clean          remove .venv, builds and caches"

# The stamp is written last: an install that broke off is done again.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[all,dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/blockfit demo

# mypy takes one core for a minute: the tests start beside it.
test: $(STAMP)
	$(MAKE) --no-print-directory --jobs=2 lint tests

# What is compiled once is read by the hundreds of processes that tests start.
tests: browser
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# Tests look at reports in Chromium and are skipped without it. Nothing fails where it cannot be had.
browser: $(STAMP)
	@if ! { command -v chromium && command -v chromedriver; } >/dev/null 2>&1 \
	    && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 \
	    && [ ! -e $(VENV)/.browser-tried ]; then \
	  echo "installing chromium for the tests of reports"; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 600 apt-get install -y -qq \
	    --no-install-recommends chromium chromium-driver; } >/dev/null 2>&1 \
	    || echo "could not install it; those tests will be skipped"; \
	  touch $(VENV)/.browser-tried; \
	fi

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html"

bench: $(STAMP)
	$(BIN)/python benchmarks/calibration.py
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/search.py
	$(BIN)/python benchmarks/narrowing.py

bench-quality: $(STAMP)
	$(BIN)/python benchmarks/quality.py

fuzz: $(STAMP)
	$(BIN)/python tests/tools/fuzz.py --folders 10000 --plans 10000 --targets 20000 --seed 0

audit: $(STAMP)
	$(BIN)/python benchmarks/audit.py

compat:
	PYTHON=$(PYTHON) benchmarks/compat.sh

clean:
	rm -rf $(VENV) .compat build dist site src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
