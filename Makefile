# draftloom: `make help` lists what there is.
#
# Every target sets up what it needs, in .venv, and does so once: the stamps below say when the
# set-up is out of date. It needs make, Python 3.11 or newer and a package registry, nothing else.

SHELL := bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

# ---------------------------------------------------------------- settings (make NAME=VALUE)

# The Python to build .venv with, if not the first one found that is new enough.
PYTHON ?=
# The compute backend of mlx: none (macOS: Metal is part of mlx), cuda (driver 580 on) or cpu.
ifeq ($(origin BACKEND),undefined)
BACKEND := $(shell \
  if [ "$$(uname -s)" = Darwin ]; then echo none; \
  elif [ "$$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null \
             | head -n 1 | cut -d. -f1)" -ge 580 ] 2>/dev/null; then echo cuda; \
  else echo cpu; fi)
endif
# pytest workers, and further arguments for pytest: make test ARGS="-k rollback"
JOBS ?= 2
ARGS ?=

# ---------------------------------------------------------------- names

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
DEPS := $(VENV)/.deps-$(BACKEND)
READY := $(VENV)/.ready
SITE := build/site
PINS := constraints/base.txt $(if $(filter none,$(BACKEND)),,constraints/$(BACKEND).txt)
PACKAGES := core drafters verifiers caches kernels adapters apps
SOURCES = $(shell find $(PACKAGES) -type f -not -name '*.pyc' 2>/dev/null)
PYTEST := $(PY) -m pytest -q -n $(JOBS)
OLDEST := build/oldest
OLDEST_TESTS := $(addprefix tests/,parity/test_mlx_lm_contract.py parity/test_families.py \
  parity/test_more_families.py parity/test_recurrent.py parity/test_dflash.py \
  property/test_sliding_window_cache.py unit/test_engine.py unit/test_kv_cache.py unit/test_api.py)

ifeq ($(filter none cuda cpu,$(BACKEND)),)
$(error BACKEND is '$(BACKEND)'; it can be none (macOS), cuda or cpu)
endif

.PHONY: help setup demo test test-oldest quick lint format types imports wheel-check ci lock upgrade clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14
	@echo
	@echo "settings: PYTHON=python3.12  BACKEND=none|cuda|cpu (here: $(BACKEND))  JOBS=2  ARGS=..."

# ---------------------------------------------------------------- set-up

# Third-party packages: exactly the pinned ones, each checked against its hash. The environment is
# built anew, since two backends of mlx cannot lie in one.
$(DEPS): $(PINS)
	@found=""; for p in $(if $(PYTHON),$(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
	  if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    found=$$p; break; fi; done; \
	if [ -z "$$found" ]; then \
	  echo "draftloom needs Python 3.11 or newer, and $(if $(PYTHON),$(PYTHON),python3) is not:" \
	    "install one, or name one with make PYTHON=/path/to/python" >&2; exit 1; fi; \
	echo "Setting up $(VENV) with $$("$$found" --version), backend $(BACKEND) (once; minutes at most)" >&2; \
	if [ $(BACKEND) = cpu ] && nvidia-smi -L >/dev/null 2>&1; then \
	  echo "There is an NVIDIA GPU, but CUDA 13 needs driver 580 or newer: using the CPU" >&2; fi; \
	rm -rf $(VENV); \
	"$$found" -m venv $(VENV) || { echo "$$found cannot make a virtual environment" \
	  "(on Debian and Ubuntu: apt install python3-venv)" >&2; rm -rf $(VENV); exit 1; }
	@$(PIP) install -qq --require-hashes --no-deps --only-binary :all: $(addprefix -r ,$(PINS))
	@touch $@

# The project itself, editable: a changed module counts at once, a changed pyproject.toml re-runs this.
$(READY): $(DEPS) pyproject.toml
	@$(PIP) install -qq --no-deps --no-build-isolation --no-index --editable .
	@touch $@

setup: $(READY) ## make .venv ready, and nothing else
	@:

# ---------------------------------------------------------------- use

demo: $(READY) ## generate with the bundled pair and show what speculation did
	@$(PY) -m draftloom.apps.demo

# ---------------------------------------------------------------- check

test: $(READY) ## all tests, quick and slow (ARGS="-k rollback" to choose)
	@$(PYTEST) $(ARGS)

quick: $(READY) ## the quick tests
	@$(PYTEST) -m "not slow" $(ARGS)

# The oldest mlx and mlx-lm that pyproject.toml allows, in an environment of their own; everything
# else as pinned. `make test` runs on the newest.
$(OLDEST)/.ready: constraints/oldest.txt constraints/base.txt pyproject.toml $(DEPS)
	@rm -rf $(OLDEST) && $(PY) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install -qq --disable-pip-version-check --no-input \
	  --require-hashes --no-deps --only-binary :all: -r constraints/base.txt
	@$(OLDEST)/bin/python -m pip install -qq --disable-pip-version-check --no-input \
	  --require-hashes --no-deps --only-binary :all: -r constraints/oldest.txt
	@$(OLDEST)/bin/python -m pip install -qq --disable-pip-version-check --no-input \
	  --no-deps --no-build-isolation --no-index --editable .
	@touch $@

test-oldest: $(OLDEST)/.ready ## the contract with mlx-lm and the core, on the oldest mlx and mlx-lm
	@$(OLDEST)/bin/python -m pytest -q -n $(JOBS) -m "not slow" $(OLDEST_TESTS) $(ARGS)

lint: $(READY) ## ruff: rules and formatting
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .

format: $(READY) ## ruff: rewrite the files as `make lint` wants them
	@$(PY) -m ruff check --fix . ; $(PY) -m ruff format .

# The package as a user has it: type checkers and import-linter do not follow an editable install.
$(SITE)/.stamp: $(READY) $(SOURCES)
	@rm -rf build/lib build/bdist.* $(SITE)
	@$(PIP) install -qq --no-deps --no-build-isolation --no-index --no-compile --target $(SITE) .
	@rm -rf build/lib build/bdist.*
	@touch $@

# Paths are printed as those of the checkout.
types: $(SITE)/.stamp ## mypy on the installed package
	@set -o pipefail; MYPYPATH=$(SITE) $(PY) -m mypy --config-file pyproject.toml -p draftloom \
	  | sed -E -e 's#^$(SITE)/draftloom/(drafters|verifiers|caches|kernels|adapters|apps)/#\1/#' \
	           -e 's#^$(SITE)/draftloom/#core/#'

imports: $(SITE)/.stamp ## import-linter: dependencies point one way
	@PYTHONPATH=$(SITE) $(VENV)/bin/lint-imports --no-cache

wheel-check: $(READY) ## build the wheel, install it in a fresh environment, use it there
	@$(PY) tests/packaging/check_wheel.py

ci: ## what continuous integration runs
	@bash .ci/run

# ---------------------------------------------------------------- pins

# Pins, hashes and platform markers; no host, no path. uv itself is pinned in constraints/lock.txt.
UV_COMPILE = $(abspath build/lock/bin/uv) pip compile --quiet --universal --python-version 3.11 \
  --generate-hashes --no-header --no-emit-index-url --no-emit-find-links $(LOCK_ARGS)

build/lock/.stamp: constraints/lock.txt $(DEPS)
	@rm -rf build/lock && $(PY) -m venv build/lock
	@build/lock/bin/python -m pip install -qq --disable-pip-version-check --require-hashes \
	  --no-deps --only-binary :all: -r constraints/lock.txt
	@touch $@

lock: build/lock/.stamp ## bring constraints/ in line with pyproject.toml, keeping other pins
	@$(UV_COMPILE) pyproject.toml --group dev --output-file constraints/base.txt
	@set -e; for backend in cpu:mlx-cpu cuda:mlx-cuda-13; do \
	  mlx=$$(sed -nE 's/^mlx==([^ ]+).*/\1/p' constraints/base.txt); \
	  echo "$${backend#*:}==$$mlx" | $(UV_COMPILE) - --no-annotate --constraint constraints/base.txt \
	    --output-file constraints/$${backend%:*}.txt; done
	@set -o pipefail; echo uv | $(UV_COMPILE) - --no-annotate --output-file constraints/lock.txt

upgrade: ## take the newest versions that pyproject.toml allows into constraints/
	@$(MAKE) --no-print-directory lock LOCK_ARGS=--upgrade

clean: ## remove everything that was made here
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(PACKAGES) tests docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
