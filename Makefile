# Every target does all that it needs on a fresh machine with Python >= 3.10 and a C++ compiler: virtual environment (.venv), pinned
# dependencies, build. PYTHON=/path/to/python uses an existing environment instead and installs nothing into it but this package.
# Paths are relative to this folder, so that a path with spaces works.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow build lint format bench-cpu cuda-code wheel wheel-matrix \
    gpu-check gpu-bench gpu-tune gpu-sanitize docs clean

JOBS ?= 2
RUN ?= runs/demo
BUDGET ?= 510
# In development a CPU library that cannot be built is an error; IOUBAL_BUILD_CPU=0 or auto accepts pure Python. The CUDA
# library is built where nvcc is, GPU or not; IOUBAL_BUILD_CUDA=1 makes an error of what prevents it.
export IOUBAL_BUILD_CPU ?= 1
export IOUBAL_BUILD_CUDA ?= auto
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# The packaged program: its module cannot be run with -m, and an existing environment need not be on PATH.
CLANG_FORMAT = $(PY) -c 'import sys, clang_format; sys.exit(clang_format.clang_format())'

VENV := .venv
DEPENDENCIES := $(shell cat constraints.txt pyproject.toml | cksum | tr ' ' '-')
PACKAGING := $(shell cat setup.py pyproject.toml ioubal_kernels/_version.py | cksum | tr ' ' '-')

ifdef PYTHON
PY := "$(PYTHON)"
STATE := build/env-$(shell echo '$(PYTHON)' | cksum | cut -d ' ' -f 1)
READY := check-env
else
PY := $(VENV)/bin/python
STATE := $(VENV)
READY := $(VENV)/.dependencies-$(DEPENDENCIES)
endif

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | awk -F '\t' '{ printf "  make %-12s %s\n", $$1, $$2 }'
	@echo "  PYTHON=/path/to/python uses an existing environment; JOBS=$(JOBS) test processes; RUN=$(RUN) is the demo's folder"
	@echo "  BUDGET=$(BUDGET) seconds for a gpu target, the build included; ARGS= more options of its program (ARGS=--help)"

demo: build  ## make the synthetic data, train and compare both losses, write runs/demo/report.html
	$(PY) -m ioubal_kernels demo -o "$(RUN)"

test: build  ## the quick tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n $(JOBS)

test-slow: build  ## the slow tests: packaging, trainings
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow -n $(JOBS) --dist loadfile --no-loadscope-reorder || { status=$$?; test $$status -eq 5 && echo "no slow tests here"; }

build: $(READY) $(STATE)/.installed-$(PACKAGING)  ## install the package in place, compile what changed
	@$(PY) setup.py -q build_ext --inplace

lint: $(READY)  ## ruff, clang-format: check only
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@set -e; files=$$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc'); \
	    echo "clang-format --dry-run -Werror ($$(echo "$$files" | wc -l) files)"; \
	    $(CLANG_FORMAT) --dry-run -Werror $$files

format: $(READY)  ## ruff, clang-format: rewrite
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc')

docs: $(READY)  ## build the documentation site in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

bench-cpu: build  ## time and memory of the losses on one CPU thread; SAVE=1 stores the rows; ARGS="--only TEXT"
	$(PY) -m ioubal_kernels.bench.run --device cpu $(if $(SAVE),,--no-save) $(ARGS)

cuda-code: build  ## check the GPU machine code against its budget: registers, spills, wide loads; no GPU needed
	$(PY) tools/cuda_code.py

wheel: $(READY)  ## the wheel, its tag checked by auditwheel, and the source distribution, into dist/
	$(PY) tools/build_wheel.py

wheel-matrix: wheel  ## install that wheel under Python 3.10 to 3.13 and several torch versions, smoke-test each; ARGS=--strict
	$(PY) tools/wheel_matrix.py $(ARGS)

# On a GPU, for the one architecture that is there; without a usable GPU one line and an error, before anything is built.
# What the build took is taken off the program's time.
ON_GPU = @began=$$(date +%s) && arch=$$($(PY) bench/gpu/arch.py $@) && \
    TORCH_CUDA_ARCH_LIST="$$arch" IOUBAL_BUILD_CUDA=1 $(MAKE) --no-print-directory build && \
    left=$$(( $(BUDGET) + began - $$(date +%s) )) && budget="--budget $$left" && \
    { test $$left -gt 0 || { echo "$@: the build took all of BUDGET=$(BUDGET) seconds; again: it is built now" >&2; exit 1; }; } && \
    $(PY) -m ioubal_kernels.bench

gpu-check: $(READY)  ## everything the CUDA kernels must hold, on this machine's GPU
	$(ON_GPU).gpu.check $$budget $(ARGS)

gpu-bench: $(READY)  ## device time of the losses beside a copy, on this machine's GPU; stores the rows
	$(ON_GPU).run --device cuda $$budget $(ARGS)

gpu-tune: $(READY)  ## the dense pass under one launch plan after the other, on this machine's GPU
	$(ON_GPU).gpu.tune $$budget $(ARGS)

gpu-sanitize: $(READY)  ## compute-sanitizer's four tools over small cases
	$(ON_GPU).gpu.sanitize $$budget $(ARGS)

clean:  ## remove what was built; .venv and runs stay
	rm -rf build dist site *.egg-info ioubal_kernels/*.so ioubal_kernels/_build_info.json .pytest_cache .ruff_cache .hypothesis $(VENV)/.installed-*
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The package in place (-e). Again only when its packaging changes. pip would compile without a word: `build` above does it.
$(STATE)/.installed-$(PACKAGING): | $(READY)
	@mkdir -p $(STATE)
	@rm -f $(STATE)/.installed-*
	IOUBAL_BUILD_CPU=0 IOUBAL_BUILD_CUDA=0 $(PY) -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

# Dependencies first, without building: the library needs torch to be there.
$(VENV)/.dependencies-$(DEPENDENCIES): $(VENV)/bin/python
	@rm -f $(VENV)/.dependencies-* $(VENV)/.installed-*
	$(VENV)/bin/python -m pip install -q -c constraints.txt setuptools wheel
	IOUBAL_BUILD_CPU=0 IOUBAL_BUILD_CUDA=0 $(VENV)/bin/python -m pip install -c constraints.txt --no-build-isolation -e '.[train,test,lint,docs]'
	@touch $@

$(VENV)/bin/python:
	@for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	    if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
	        echo "$$candidate -m venv $(VENV)"; exec "$$candidate" -m venv $(VENV); \
	    fi; \
	done; \
	echo "make: needs Python >= 3.10 with the venv module (python3 here: $$(python3 --version 2>&1)). Install it (Debian, Ubuntu:" >&2; \
	echo "      apt install python3 python3-venv), or name an existing environment: make PYTHON=/path/to/python ..." >&2; exit 1

# An existing environment must have what the goals at hand use.
EXTRAS := $(if $(filter demo test test-slow,$(MAKECMDGOALS)),train) \
          $(if $(filter test test-slow wheel wheel-matrix,$(MAKECMDGOALS)),test) \
          $(if $(filter lint format,$(MAKECMDGOALS)),lint) $(if $(filter docs,$(MAKECMDGOALS)),docs)
.PHONY: check-env
check-env:
	@$(PY) tools/check_env.py $(EXTRAS)
