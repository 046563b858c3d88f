# Two commands on a fresh machine:   make train   and   make test.   The others: test-all, env, build, core, lint, format, bench, clean.
# Your pip settings (index, proxy, find-links) are honoured. TORCH is handed to pip, PYTHON makes the environment:
#   make test TORCH="torch==2.13.0+cpu" PYTHON=python3.12          with PyTorch's CPU index in your pip settings
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
RUN ?= runs/glyphs-maml-5way-1shot
TIME_LIMIT ?= 230
JOBS ?= $(shell nproc 2> /dev/null || echo 2)

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMP := $(VENV)/stamps
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') fastmaml/build.py
CPP := $(shell find csrc tests/core bench/kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PART := .ci/part
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help train test test-all env build core race count cuda cuda-all gpu lint format bench clean

help:
	@echo "make train   environment, build, exact MAML on built-in images, evaluation, report (4 to 8 minutes on 2 cores)"
	@echo "make test    the test suite: C++ core and Python (test-all: the slow tests, the sanitizers and the race build too)"
	@echo "make cuda    the CUDA library by nvcc (cuda-all: for more devices); needs no GPU"
	@echo "make gpu     on a machine with a GPU: build, all tests, compute-sanitizer, timings"
	@echo "make env | build | core | lint | format | bench | clean"

# ---------------------------------------------------------------- the two commands

# A run that was interrupted goes on where it stopped; one that is finished is left alone (RUN=runs/other makes another).
train: $(RUN)/report.html
	@echo "The report: $(abspath $(RUN))/report.html"

$(RUN)/report.html: | $(STAMP)/build
	@if [ -e $(RUN)/checkpoints/last.json ]; then \
	  $(PY) -m fastmaml train --resume $(RUN); \
	else \
	  rm -rf $(RUN); \
	  $(PY) -m fastmaml train glyphs --algorithm maml --ways 5 --shots 1 --time-limit $(TIME_LIMIT) --out $(RUN); \
	fi

# The core's own tests are linked with the module's objects, whose sources and flags are the same. Which kernels were launched is asked
# after all that may launch them.
EMULATED := $(if $(filter Linux,$(shell uname)),emulated)
MARKS ?= not slow and not bench
BUILT = $(abspath build/$(shell $(PY) -c "import sys; print(sys.implementation.cache_tag)"))
test: $(STAMP)/build $(STAMP)/test
	@$(PART) "C++ programs, of the core and emulated" $(MAKE) --no-print-directory -j $(JOBS) -C csrc test $(EMULATED) BUILT=$(BUILT)
	@$(PART) "pytest" $(PY) -m pytest -q -n $(JOBS) --dist worksteal -m "$(MARKS)" --durations=10 $(PYTEST)
	@$(if $(PYTEST),,$(PART) "kernels that were launched" $(PY) -m pytest -q tests/emulated/test_kernel_coverage.py)
	@$(PART) --table

# Also what few changes can break, and what takes long: .ci/run runs each part whose sources have changed.
test-all: test
	@$(MAKE) --no-print-directory core SANITIZE=thread
	@$(MAKE) --no-print-directory core SANITIZE=address,undefined
	@$(MAKE) --no-print-directory race
	@$(PART) "pytest, slow tests and bench" $(PY) -m pytest -q -m "slow or bench" --durations=10
	@$(PART) --table

ifneq (,$(filter test test-all,$(MAKECMDGOALS)))
$(shell $(PART) --begin)
endif

# ---------------------------------------------------------------- its parts

env: $(STAMP)/env

build: $(STAMP)/build

$(STAMP)/torch:
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMP)
	$(PART) "environment" $(PIP) install $(TORCH) numpy
	@echo '$(TORCH)' > $@

$(STAMP)/env: $(STAMP)/torch pyproject.toml setup.py
	$(PART) "environment" $(PIP) install "setuptools>=77" wheel ninja
	FASTMAML_NO_COMPILE=1 $(PART) "environment" $(PIP) install --no-build-isolation -e ".[train,vision,report]"
	@touch $@

$(STAMP)/test: $(STAMP)/env
	FASTMAML_NO_COMPILE=1 $(PART) "environment of the tests" $(PIP) install --no-build-isolation -e ".[test]"
	@touch $@

$(STAMP)/lint: $(STAMP)/env
	FASTMAML_NO_COMPILE=1 $(PART) "environment of lint" $(PIP) install --no-build-isolation -e ".[lint]"
	@touch $@

$(STAMP)/build: $(STAMP)/env $(SOURCES)
	$(PART) "build" $(PY) fastmaml/build.py
	@touch $@

# The C++ core and its tests, without Python and torch; SANITIZE=address,undefined or thread.
core:
	@$(PART) "core$(if $(SANITIZE), under $(SANITIZE))" $(MAKE) --no-print-directory -j $(JOBS) -C csrc test

# The CUDA kernels on the emulator with every access watched, and the program that counts launches: what `pytest -m race` asks for.
# `count` makes the program alone.
race: $(STAMP)/build
	@$(PART) "race build: compile, run" $(MAKE) --no-print-directory -j $(JOBS) -C csrc race count BUILT=$(BUILT)

count: $(STAMP)/build
	@$(PART) "the program that counts launches" $(MAKE) --no-print-directory -j $(JOBS) -C csrc count BUILT=$(BUILT)

# The CUDA library, by the nvcc of CUDA_HOME, of the PATH or of pip's packages, for sm_80, sm_90 and PTX; a float32 kernel that spills
# registers is an error. cuda-all: sm_100 and sm_120 too.
cuda: $(STAMP)/env
	$(PART) "the CUDA library by nvcc" $(PY) fastmaml/build.py --cuda

cuda-all: $(STAMP)/env
	FASTMAML_CUDA_ARCHS=all $(PY) fastmaml/build.py --cuda

gpu: $(STAMP)/build $(STAMP)/test
	$(PY) -m bench.gpu $(GPU)

lint: $(STAMP)/lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PART) "mypy" $(VENV)/bin/mypy
	$(PART) "clang-format" $(VENV)/bin/clang-format --dry-run -Werror $(CPP)

format: $(STAMP)/lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

# Everything that bench/README.md shows, about five hours; BENCH="--parts startup" takes a part. Interrupted, it goes on the next time.
bench: $(STAMP)/build
	$(PY) -m bench $(BENCH)

clean:
	rm -rf build dist fastmaml/_C*.so fastmaml/_cuda.so fastmaml/_C.stamp *.egg-info $(STAMP)/build
