# Every target prepares .venv by itself; a finished set-up costs nothing.
#   make PYTHON=... setup  another interpreter     make V=1 setup  full output

PYTHON ?= python3.11
# One compiler per core: compiling mmcv is the long part of the set-up.
MAX_JOBS ?= $(shell nproc)
V ?=
# Small tensors gain nothing from a second OpenMP thread, and a waiting thread
# spins in the way of the data loaders: tests and demo are faster with one.
export OMP_NUM_THREADS ?= 1

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip
# Written last, and only when tools/check_env.py has passed.
STAMP := $(VENV)/.ready
MMCV := $(shell sed -n 's/^\# *\(mmcv==[0-9.]*\)$$/\1/p' requirements.txt)
SOURCES := $(wildcard mmdet_efficientdet configs tools tests setup.py)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup demo quick test lint format clean

# A checkout that was moved, or whose Python went away, is set up again.
ifneq "$(shell test -x $(PY) && cat $(STAMP) 2>/dev/null)" "$(CURDIR)"
.PHONY: $(STAMP)
endif

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(STAMP)  ## install the pinned stack into .venv

demo: $(STAMP)  ## train, test and draw a small detector from scratch
	@$(PY) tools/demo.py

quick: $(STAMP)  ## run the tests that take seconds
	@$(PY) -m pytest -q -m 'not slow and not distributed' tests

test: $(STAMP)  ## run all tests and list the slowest
	@$(PY) -m pytest -q --durations=15 tests

lint: $(STAMP)  ## flake8, isort and yapf; changes nothing
	@status=0
	$(PY) -m flake8 $(SOURCES) || status=1
	$(PY) -m isort --check-only --diff --quiet $(SOURCES) || status=1
	$(PY) -m yapf --diff --recursive --parallel $(SOURCES) || status=1
	exit $$status

format: $(STAMP)  ## let isort and yapf rewrite the sources
	@$(PY) -m isort --quiet $(SOURCES)
	$(PY) -m yapf --in-place --recursive --parallel $(SOURCES)

clean:  ## remove .venv and whatever was built in the tree
	@rm -rf $(VENV) build dist *.egg-info mmdet_efficientdet/.mim .pytest_cache
	find $(SOURCES) -name __pycache__ -prune -exec rm -rf {} +

# Each step may be interrupted and repeated. pip reads the user's own PIP_*
# variables, so a wheel of mmcv under PIP_FIND_LINKS is found.
$(STAMP): requirements.txt setup.cfg setup.py pyproject.toml
	@rm -f $(STAMP)
	export PATH="$(CURDIR)/$(VENV)/bin:$$PATH" MAX_JOBS="$(MAX_JOBS)"
	die() { echo "make: $$*" >&2; exit 1; }

	# 1. The environment.
	if ! $(PIP) --version >/dev/null 2>&1; then
	    rm -rf $(VENV)
	    command -v $(PYTHON) >/dev/null || die "$(PYTHON) is not installed;" \
	        "install Python 3.11, or name yours: make setup PYTHON=..."
	    $(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || die "$(PYTHON) cannot" \
	        "create a virtual environment; on Debian run:" \
	        "apt-get install $(notdir $(PYTHON))-venv"
	fi
	# pip takes a package without RECORD for a complete one, but its installation
	# was cut off.
	for info in $(VENV)/lib/python*/site-packages/*.dist-info; do
	    test -e "$$info/RECORD" || rm -rf "$$info"
	done

	# 2. A ready wheel of mmcv, else one that pip compiled for another clone and
	# kept in its cache, else the compiler: see to it before the long download.
	need_compiler() {
	    command -v "$${CXX:-c++}" >/dev/null ||
	        die "no C++ compiler to compile mmcv with; on Debian run:" \
	            "apt-get install g++"
	    headers=$$($(PY) -c \
	        'import sysconfig; print(sysconfig.get_path("include"))')
	    test -e "$$headers/Python.h" ||
	        die "Python.h is missing, mmcv cannot be compiled; on Debian run:" \
	            "apt-get install $(notdir $(PYTHON))-dev"
	}
	$(PIP) install -q --no-deps --only-binary mmcv $(MMCV) >/dev/null 2>&1 ||
	    [[ $$($(PIP) cache list $(subst ==,-,$(MMCV)) 2>&1) == *mmcv-*.whl* ]] ||
	    need_compiler

	# 3. All but mmcv.
	echo "Set-up: pinned packages (the first time 4 GB to download, 8 GB on disk)"
	$(PIP) install --no-deps -r requirements.txt |
	    { trap '' INT; grep --line-buffered -v '^Requirement already' || :; }

	# 4. mmcv, unless it came in step 2 and fits this torch.
	log=$(VENV)/mmcv-build.log
	has_ops() { $(PY) -c 'import torch, mmcv._ext' >/dev/null 2>&1; }
	minutes() { printf '%d:%02d min' $$((SECONDS / 60)) $$((SECONDS % 60)); }
	progress() {  # one counter instead of ninja's commands of 3 kB each
	    local line done=0 back=; test -t 1 && back=$$'\r\e[K'
	    while IFS= read -r line; do
	        if [[ $$line == *'Building wheel for mmcv'*'started'* ||
	              ( $$done == 0 && $$line == *'running bdist_wheel'* ) ]]; then
	            SECONDS=0
	            echo "Compiling the operators of mmcv, once: about 17 minutes" \
	                "on 2 cores, here $$MAX_JOBS at a time. Log: $$log"
	            done=1
	        elif [[ $$line =~ ^\ *\[([0-9]+)/([0-9]+)\] ]]; then
	            printf '%s  mmcv: %s of %s files, %s' "$$back" \
	                "$${BASH_REMATCH[@]:1:2}" "$$(minutes)"
	            test -n "$$back" || echo
	        fi
	    done
	    test -z "$$back" || echo
	}
	test -z "$(V)" && ninja --version >/dev/null 2>&1 || progress() { cat; }
	gpu_has_nvcc='import sys, torch, torch.utils.cpp_extension as cpp
	sys.exit(torch.cuda.is_available() and cpp.CUDA_HOME is None)'
	compile_mmcv() {
	    # With a GPU mmcv insists on nvcc, which a driver alone does not bring.
	    if ! $(PY) -c "$$gpu_has_nvcc" 2>/dev/null; then
	        echo "A GPU but no CUDA toolkit (nvcc): mmcv gets operators for the" \
	            "CPU only. For the GPU install the toolkit, then: make clean setup"
	        local -x CUDA_VISIBLE_DEVICES=
	    fi
	    MMCV_WITH_OPS=1 $(PIP) install -v --no-deps --no-build-isolation \
	        --force-reinstall "$$@" $(MMCV) 2>&1 | tee -i $$log | progress ||
	        { tail -n 30 $$log; die "mmcv did not compile; see $$log"; }
	}
	has_ops || compile_mmcv
	if ! has_ops; then
	    echo "pip kept an mmcv that was compiled without or for another torch."
	    need_compiler
	    $(PIP) cache remove $(subst ==,-,$(MMCV)) >/dev/null 2>&1 || true
	    compile_mmcv --no-binary mmcv
	fi

	# 5. The package itself, then the proof.
	$(PIP) install -q --no-deps --no-build-isolation -e .
	$(PY) tools/check_env.py
	echo "$(CURDIR)" > $(STAMP)
