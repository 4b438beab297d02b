# Everything runs in .venv beside this file, made on first use and only changed when its inputs change.
ROOT := $(patsubst %/,%,$(dir $(realpath $(lastword $(MAKEFILE_LIST)))))
VENV := $(ROOT)/.venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTHON ?= python3
TORCH := 2.13.0
TRITON := 3.9.0
PYTEST_ARGS ?= -n 2

.PHONY: help install native demo test proof proof-all bench format clean

help:
	@echo 'make demo     a small video from the tiny model, into demo/'
	@echo 'make test     lint, types and tests'
	@echo 'make proof    what is proved about kernels and processes without a GPU; proof-all leaves nothing out'
	@echo 'make bench    all benchmarks, as a table and a chart'
	@echo 'make native   rebuild the C++ library after a change (the others do it too)'
	@echo 'make format   apply the formatter and the safe lint fixes'
	@echo 'make clean    remove .venv and everything that was built'
	@echo 'PYTHON=python3.12 chooses the interpreter that .venv is made with.'

install: $(VENV)/installed

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'The pinned packages need Python 3.11 or newer, and $(PYTHON) is not: make PYTHON=/path/to/python3'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo '$(PYTHON) has no venv module; on Debian and Ubuntu: apt-get install python3-venv'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and alone, so that the index or wheel you have configured decides its build (CPU, CUDA, ROCm). GPU builds
# bring the Triton they were made with; the CPU build brings none, and gets ours.
$(VENV)/installed: $(VENV)/created $(ROOT)/constraints.txt $(ROOT)/pyproject.toml $(ROOT)/setup.py
	$(PIP) install -q -c $(ROOT)/constraints.txt torch==$(TORCH) setuptools wheel cmake ninja
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install -q 'triton==$(TRITON) ; sys_platform == "linux"'
	$(PIP) install -q -c $(ROOT)/constraints.txt --no-build-isolation -e '$(ROOT)[dev]'
	@touch $@

# CMake knows what changed; when nothing did, this takes a moment.
native: install
	@cd $(ROOT) && $(BIN)/python setup.py -q native

demo: native
	cd $(ROOT) && $(BIN)/bernini demo --output demo

test: native
	cd $(ROOT) && $(BIN)/ruff check .
	cd $(ROOT) && $(BIN)/ruff format --check .
	$(BIN)/python $(ROOT)/tests/typecheck.py
	cd $(ROOT) && $(BIN)/pytest $(PYTEST_ARGS)

# Kernels run in Triton's interpreter in one process and are compiled in another: Triton decides when it is imported.
# The last are trainings of several processes, which take too long for `make test`.
proof: native
	cd $(ROOT) && TRITON_INTERPRET=1 $(BIN)/pytest $(PYTEST_ARGS) tests/proof/interpreted
	cd $(ROOT) && $(BIN)/pytest $(PYTEST_ARGS) tests/proof/codegen
	cd $(ROOT) && $(BIN)/pytest tests/proof/processes

proof-all: export BERNINI_PROOF = all
proof-all: proof

bench: native
	cd $(ROOT) && $(BIN)/python -m bench_perf all

format: install
	cd $(ROOT) && $(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(ROOT)/build $(ROOT)/dist $(ROOT)/*.egg-info $(ROOT)/kernels/native/*.so
	rm -rf $(ROOT)/.mypy_cache $(ROOT)/.ruff_cache $(ROOT)/.pytest_cache $(ROOT)/.hypothesis $(ROOT)/.benchmarks
