# Every target prepares .venv by itself; a finished set-up costs nothing.
#   make PYTHON=... setup  another interpreter
#   make STACK=onedl ...   the fork of MMDetection, in .venv-onedl

PYTHON ?= python3.11
STACK ?= upstream
$(if $(filter upstream onedl,$(STACK)),,$(error STACK=$(STACK) must be upstream or onedl))
FORK := $(filter onedl-,$(STACK)-)
# One compiler per core: compiling mmcv is the long part of the set-up.
MAX_JOBS ?= $(shell nproc)
# Small tensors gain nothing from a second OpenMP thread, and a waiting thread
# spins in the way of the data loaders: tests and demo are faster with one.
export OMP_NUM_THREADS ?= 1

VENV := .venv$(FORK:%-=-%)
PY := $(VENV)/bin/python
PIP := $(PY) -m pip
# Two processes take half the time of one on two cores. Each holds up to 3 GB.
PYTEST := $(PY) -m pytest -q -n auto --maxprocesses 4 --dist loadfile
# Written last, and only when tools/doctor.py has passed.
STAMP := $(VENV)/.ready
pin = $(shell grep -o '^[\# ]*$(1)==[0-9.]*' requirements.txt | tr -d '\# ')
MMCV := $(call pin,$(FORK)mmcv)
MMCV_SRC := $(VENV)/$(MMCV)-$(call pin,torch)
MMCV_LOG := $(VENV)/mmcv-build.log
SOURCES := $(wildcard mmdet_efficientdet configs examples tools tests setup.py)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup demo quick test deploy docs lint format clean

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
	@$(PYTEST) -m 'not slow and not distributed' tests

test: $(STAMP)  ## run all tests and list the slowest
	@$(PYTEST) --durations=15 tests

deploy: $(STAMP)  ## run the tests of LiteRT, MediaPipe and OpenVINO
	@if ! .venv-deploy/bin/python -c 'import litert_torch, mediapipe, openvino' \
	    2>/dev/null; then
	    echo "Set-up of .venv-deploy: 2.5 GB to download, 6.6 GB on disk"
	    $(PYTHON) -m venv .venv-deploy
	    .venv-deploy/bin/python -m pip install -q '.[litert,openvino]' pillow
	fi
	$(PY) -m pytest -q tests/deploy/runtimes.py

docs: $(STAMP)  ## render docs/ into build/site
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --site-dir build/site

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
	@rm -rf $(VENV) .venv*/.ready build dist *.egg-info mmdet_efficientdet/.mim \
	    .pytest_cache
	find $(SOURCES) -name __pycache__ -prune -exec rm -rf {} +

# Each step may be interrupted and repeated.
$(STAMP): requirements.txt setup.cfg setup.py pyproject.toml
	@rm -f $(STAMP)
	export PATH="$(CURDIR)/$(VENV)/bin:$$PATH" MAX_JOBS="$(MAX_JOBS)"
	trap 'exit 130' INT
	die() { echo "make: $$*" >&2; exit 1; }
	compiled() {
	    sed -n 's|^\[\([0-9]*\)/\([0-9]*\)\].*|, compiled \1 of \2 files|p' \
	        $(MMCV_LOG) 2>/dev/null | tail -n 1
	}
	alive() {  # runs a command; a line every 10 seconds says that it runs
	    while sleep 10 >/dev/null 2>&1 && kill -0 $$$$ 2>/dev/null; do
	        printf '  %d:%02d min%s\n' $$((SECONDS / 60)) $$((SECONDS % 60)) \
	            "$$(compiled)"
	    done &
	    local beat=$$! status=0
	    "$$@" || status=$$?
	    kill $$beat
	    return $$status
	}

	# 1. The environment.
	echo "Set-up: the first time 4 GB to download, 8 GB on disk"
	rm -f $(MMCV_LOG)
	if ! $(PIP) --version >/dev/null 2>&1; then
	    rm -rf $(VENV)
	    command -v $(PYTHON) >/dev/null || die "$(PYTHON) is not installed;" \
	        "install Python 3.11, or name yours: make setup PYTHON=..."
	    alive $(PYTHON) -m venv $(VENV) 2>/dev/null || die "$(PYTHON) cannot" \
	        "create a virtual environment; on Debian run:" \
	        "apt-get install $(notdir $(PYTHON))-venv"
	fi
	# A package whose installation was interrupted looks installed to pip and uv.
	$(PY) -c 'import pathlib, shutil, sysconfig
	from importlib.metadata import PathDistribution
	intact = lambda file, path: file.suffix == ".pyc" or (
	path.is_file() and file.size in (None, path.stat().st_size))
	for info in pathlib.Path(sysconfig.get_path("purelib")).glob("*.dist-info"):\
	files = PathDistribution(info).files or [];\
	files and all(intact(f, f.locate()) for f in files) or shutil.rmtree(info)'

	# 2. uv downloads in parallel and takes a quarter of the time of pip. It has
	# to be told the settings of pip; where it fails, pip does the work.
	alive $(PIP) install -q --no-deps $(call pin,uv) || true
	settings=$$($(PIP) config list)
	setting() {  # the environment overrides [install], which overrides [global]
	    for section in global install :env:; do
	        sed -n "s/^$$section\.$$1='\(.*\)'$$/\1/p" <<< "$$settings"
	    done | tail -n 1 | sed 's/\\n/ /g'
	}
	options=(--python $(PY) --index-strategy unsafe-best-match)
	for name in index-url extra-index-url find-links; do
	    for word in $$(setting $$name); do options+=("--$$name=$$word"); done
	done
	test -z "$$(setting no-index)" || options+=(--no-index)
	bars=; test -t 2 || bars=alive
	install() {
	    $$bars uv pip install "$${options[@]}" --no-deps "$$@" || {
	        echo "uv has failed; pip takes over and needs some minutes more"
	        alive $(PIP) install --no-deps "$$@"
	    }
	}

	# 3. A wheel of mmcv, else the compiler: see to it before the long download.
	has_ops() { $(PY) -c 'import torch, mmcv._ext' >/dev/null 2>&1; }
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
	install --only-binary $(FORK)mmcv $(MMCV) >/dev/null 2>&1 || need_compiler

	# 4. All but mmcv.
	sed '$(if $(FORK),/^mm/d; s/^# onedl: //)' requirements.txt \
	    > $(VENV)/requirements.txt
	install -r $(VENV)/requirements.txt

	# 5. mmcv, unless it came in step 3 and fits this torch. The sources stay
	# where they are unpacked, so that ninja keeps what is compiled.
	gpu_has_nvcc='import sys, torch, torch.utils.cpp_extension as cpp
	sys.exit(torch.cuda.is_available() and cpp.CUDA_HOME is None)'
	build_mmcv() (
	    exec > $(MMCV_LOG) 2>&1
	    test -e $(MMCV_SRC) || {
	        rm -rf $(MMCV_SRC).part && mkdir $(MMCV_SRC).part &&
	            $(PIP) download --no-deps --no-build-isolation \
	                --no-binary $(FORK)mmcv -d $(MMCV_SRC).part $(MMCV) &&
	            tar -xzf $(MMCV_SRC).part/*.gz -C $(MMCV_SRC).part \
	                --strip-components 1 && mv $(MMCV_SRC).part $(MMCV_SRC)
	    } && cd $(MMCV_SRC) && python -u setup.py build_ext --force bdist_wheel
	)
	if ! alive has_ops; then
	    need_compiler
	    # With a GPU mmcv insists on nvcc, which a driver alone does not bring.
	    if ! alive $(PY) -c "$$gpu_has_nvcc" 2>/dev/null; then
	        echo "A GPU but no CUDA toolkit (nvcc): mmcv gets operators for the" \
	            "CPU only. For the GPU install the toolkit, then: make clean setup"
	        export CUDA_VISIBLE_DEVICES=
	    fi
	    echo "Compiling mmcv, once: about 17 minutes on 2 cores," \
	        "here $$MAX_JOBS files at a time. Log: $(MMCV_LOG)"
	    SECONDS=0
	    alive build_mmcv && install --force-reinstall $(MMCV_SRC)/dist/*.whl &&
	        has_ops || { tail -n 30 $(MMCV_LOG); die "mmcv did not compile"; }
	    rm -rf $(MMCV_LOG) $(MMCV_SRC)/build
	    echo "To spare other checkouts this, keep $(MMCV_SRC)/dist/*.whl in a" \
	        "folder that PIP_FIND_LINKS names."
	fi

	# 6. The package itself, then the proof.
	alive $(PIP) install -q --no-deps --no-build-isolation -e .
	alive $(PY) tools/doctor.py
	echo "$(CURDIR)" > $(STAMP)
	echo "Done. Next: source $(VENV)/bin/activate"
