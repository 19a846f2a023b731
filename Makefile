# make demo     draw 64 digits into samples.png
# make test     lint, type checks, tests
# make bench    a small selection of the benchmarks, in 7 minutes at most once everything is installed
# Everything is installed into a virtual environment that the first run creates.
#
#   PYTHON   the Python that makes the environment (3.10 or newer)
#   VENV     the environment's folder; an existing environment is used as it is
#   TORCH    what pip installs where no PyTorch >= 2.11 is there yet: `make demo TORCH=torch` for the newest
#   FORCE    `make bench FORCE=1` times a busy machine all the same; what it finds is then no result
#   JOBS     how many files of tests run at a time
#   PIP_ARGS further arguments of every `pip install`, for example --no-build-isolation without a network

PYTHON   ?= python3
VENV     ?= .venv
TORCH    ?= torch==2.13.0
PIP_ARGS ?=
OUT      ?= samples.png
JOBS     ?= 2
PYTEST_ARGS ?=
FORCE    ?=
BENCH_ARGS ?=

python := $(VENV)/bin/python
pip_install = $(python) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
has_torch = -c "import torch, sys; v = tuple(int(x) for x in torch.__version__.split('.')[:2]); sys.exit(v < (2, 11))" 2>/dev/null

# What `pip install` compiles: a change in it installs anew.
native = CMakeLists.txt $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)

.PHONY: help demo test bench lint format clean
.DELETE_ON_ERROR:

help:
	@echo "make demo     draw 64 handwritten digits into samples.png (creates $(VENV) on the first run)"
	@echo "make test     ruff, mypy and the tests"
	@echo "make bench    a small selection of the benchmarks (FORCE=1: on a busy machine too)"
	@echo "make lint     ruff and mypy only"
	@echo "make format   rewrite the sources in the project's format"
	@echo "make clean    remove $(VENV) and everything generated"
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH='$(TORCH)' JOBS=$(JOBS) PIP_ARGS='$(PIP_ARGS)'"

demo: $(VENV)/.lsgm-fast-installed
	$(VENV)/bin/lsgm-fast demo --out $(OUT)

test: lint
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(python) -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

bench: $(VENV)/.lsgm-fast-installed
	@$(python) -m benchmarks.quick $(if $(FORCE),--force) $(BENCH_ARGS)

lint: $(VENV)/.lsgm-fast-installed-dev
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

format: $(VENV)/.lsgm-fast-installed-dev
	$(python) -m ruff check --fix-only .
	$(python) -m ruff format .

# A marker lies in the environment while it is being made, so that an interrupted run starts over. A Python outside
# any environment that already has PyTorch shares it.
$(VENV)/.lsgm-fast-venv:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	  { echo "error: lsgm-fast needs Python 3.10 or newer, and '$(PYTHON)' is not: choose one with make PYTHON=..." >&2; exit 1; }
	@set -e; \
	if [ -e $(VENV)/bin/python ] && [ ! -e $(VENV)/.lsgm-fast-unfinished ]; then \
	  $(python) -m pip --version >/dev/null 2>&1 || \
	    { echo "error: $(VENV) has no working pip: remove it and run make again" >&2; exit 1; }; \
	else \
	  if [ -d $(VENV) ] && [ ! -e $(VENV)/.lsgm-fast-unfinished ] && [ -n "$$(ls -A $(VENV))" ]; then \
	    echo "error: $(VENV) is not a virtual environment and not empty: choose another folder with VENV=..." >&2; exit 1; \
	  fi; \
	  rm -rf $(VENV); mkdir -p $(VENV); touch $(VENV)/.lsgm-fast-unfinished; \
	  share=; \
	  if $(PYTHON) -c "import sys; sys.exit(sys.prefix != sys.base_prefix)" && $(PYTHON) $(has_torch); then \
	    share=--system-site-packages; \
	  fi; \
	  echo "creating $(VENV)"; \
	  $(PYTHON) -m venv $$share $(VENV); \
	  mv $(VENV)/.lsgm-fast-unfinished $(VENV)/.lsgm-fast-created; \
	fi
	@$(python) -c "import pip, sys; sys.exit(int(pip.__version__.split('.')[0]) < 22)" || $(pip_install) --upgrade pip
	@touch $@

$(VENV)/.lsgm-fast-torch: $(VENV)/.lsgm-fast-venv
	@$(python) $(has_torch) || { echo "installing $(TORCH)"; $(pip_install) $(TORCH); }
	@touch $@

$(VENV)/.lsgm-fast-installed: $(VENV)/.lsgm-fast-torch pyproject.toml setup.py $(native)
	@echo "installing lsgm-fast"
	@$(pip_install) --editable .
	@touch $@

$(VENV)/.lsgm-fast-installed-dev: $(VENV)/.lsgm-fast-torch pyproject.toml setup.py $(native)
	@echo "installing lsgm-fast and the development tools"
	@$(pip_install) --editable ".[dev]"
	@touch $@ $(VENV)/.lsgm-fast-installed

# Removes the environment only where this Makefile made it.
clean:
	@if [ -e $(VENV)/.lsgm-fast-created ] || [ -e $(VENV)/.lsgm-fast-unfinished ]; then rm -rf $(VENV); fi
	rm -f $(VENV)/.lsgm-fast-*
	rm -rf lsgm_fast/_lib lsgm_fast/_C.*.so
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find lsgm_fast kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
