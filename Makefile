# `make help` lists the targets. They share one virtual environment, .venv (see deploy/setup.sh).
SHELL := /bin/bash
VENV := $(or $(SAGE_VENV),.venv)
export SAGE_VENV := $(VENV)
# These reach deploy/serve.sh as they are, spaces included.
export MODEL PORT ARGS

.DEFAULT_GOAL := help
.PHONY: help setup serve test test-previous lint docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## make or update the virtual environment in .venv
	@deploy/setup.sh

serve: setup  ## serve a model with the sage backend (MODEL=path-or-name PORT=8000 ARGS="...")
	@deploy/serve.sh

# Two processes run the tests: see tests/conftest.py. ruff and mypy run meanwhile, and print something only if they object.
test:  ## lint, type-check and run every test (ARGS="-k name" narrows it)
	@deploy/setup.sh --dev
	@log=$$(mktemp); { $(VENV)/bin/ruff check . && $(VENV)/bin/mypy; } >$$log 2>&1 & linter=$$!; \
	status=0; $(VENV)/bin/python -m pytest -n 2 $(ARGS) || status=$$?; \
	if ! wait $$linter; then cat $$log; echo "[sage] error: make lint failed, see above"; status=1; fi; \
	rm -f $$log; exit $$status

test-previous:  ## a few tests (tests/previous.txt) with the vLLM before the newest, and some kernels with the newest Triton
	@deploy/setup.sh --dev
	@deploy/previous.sh
	@.venv-0.31/bin/python -m pytest -n 2 @tests/previous.txt
	@.venv-0.31/bin/python tests/kernels/machine_code.py 90 --head-dim 64
	@.venv-0.31/bin/python tests/kernels/machine_code.py 89 --head-dim 128

lint:  ## ruff and mypy only
	@deploy/setup.sh --dev
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy

docs: setup  ## build the documentation into site/
	@deploy/docs.sh

clean:  ## remove .venv, caches and build leftovers
	rm -rf .venv .venv-0.31 .venv-docs site .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
