# Needs only make and Python 3.11 or newer: everything else goes into .venv, pinned by constraints.txt.
# pip reads its own settings (pip.conf, PIP_...): a mirror or CPU-only PyTorch wheels are chosen there.

VENV := .venv
BIN := $(VENV)/bin
# -qq: errors only; pip's warnings about mirrors that lack a package would fill the screen.
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
# Candidates in order of preference: the version that the pins were made with comes first.
PYTHONS := $(if $(PYTHON),$(PYTHON),python3.11 python3.12 python3.13 python3.14 python3 python)
SUITABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL := help
# Two installs into one environment must not run at the same time.
.NOTPARALLEL:
.PHONY: help demo test lint types imports tests clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile
	@echo "  (ARGS='...' is passed on: make tests ARGS='-k kd'; PYTHON=... names the Python to use)"

demo: $(VENV)/.ready-demo ## set up and run the main job on an embedded data set
	$(BIN)/limbeck demo $(ARGS)

test: lint types imports tests ## set up, then lint, types, import order and all tests

lint: $(VENV)/.ready-test ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready-test ## mypy
	$(BIN)/mypy

imports: $(VENV)/.ready-test ## import-linter: imports point one way
	$(BIN)/lint-imports --no-logo

tests: $(VENV)/.ready-test ## pytest
	$(BIN)/python -m pytest $(ARGS)

clean: ## remove .venv and all caches (runs stay)
	rm -rf $(VENV) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment that works is kept, even one that was made by hand; one without a working pip is made anew.
$(VENV)/.made:
	@if $(BIN)/python -c 'import pip; $(SUITABLE)' 2>/dev/null; then touch $@; exit 0; fi; \
	for python in $(PYTHONS); do \
		if "$$python" -c '$(SUITABLE)' 2>/dev/null; then \
			echo "limbeck: making $(VENV) with $$("$$python" --version) ..."; \
			"$$python" -m venv --clear $(VENV) && touch $@; exit; \
		fi; \
	done; \
	echo "limbeck: no Python 3.11 or newer with the venv module among: $(PYTHONS)." \
		"Install one or name it: make PYTHON=/path/to/python ..." >&2; \
	exit 1

$(VENV)/.ready-demo: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "limbeck: installing the package and its pinned dependencies into $(VENV) (minutes the first time) ..."
	@$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.ready-test: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "limbeck: installing the package with the test and export tools into $(VENV) (minutes the first time) ..."
	@$(PIP_INSTALL) -e '.[dev,export,detection,diffusion,graph,cluster]'
	@touch $(VENV)/.ready-demo $@
