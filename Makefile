# `make` lists the targets. Each creates .venv on its first run, and again when the files it is made from change.
#
#   make test ARGS="-k dpo"              arguments for the program that a target runs
#   make test ARGS=tests/losses          one folder of tests
#   make test WORKERS=                   in one process (default: one process per core)
#   make fuzz CASES=100000 SEED=7        more than 20,000 cases, from this seed
#   make test-arithmetic TIMES=3         each instruction set three times, alternating 1 and 2 threads
#   make install PYTHON=python3.12       another interpreter (`make clean` first if .venv is there)
#   make install PIP_INSTALL="--no-index --find-links=wheels"      options for pip
#   make gpu-evidence PLAN=H100          the expected time, without running anything
#   make gpu-evidence OUT=out FROM=runs/evidence STAGES="tests ncu" BUDGET=570 RETRY=1 KEEP_GOING=1 SUITE=tiny
#   make test NO_VENV=1 PYTHON=python3   no .venv and no downloads: use the packages of this interpreter

PYTHON ?= python3
PIP_INSTALL ?=
ARGS ?=
CASES ?= 20500
TIMES ?= 2
SEED ?=

ifdef NO_VENV
RUN := $(PYTHON)
READY := own-packages
WORKERS ?=
else
RUN := .venv/bin/python
READY := .venv/installed
WORKERS ?= -n auto --maxprocesses 8 --dist loadfile
endif

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-arithmetic fuzz integrations bench peers peer-wheels lint gpu-check \
	gpu-evidence rehearse clean own-packages

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 20

install: $(READY) ## install fused_po (editable) with everything that the other targets need

demo: $(READY) ## train a small language model with DPO: examples/dpo.py
	$(RUN) examples/dpo.py $(ARGS)

test: $(READY) ## run the ordinary tests on all cores
	$(RUN) -m pytest -m "not slow" $(WORKERS) $(ARGS)

test-slow: $(READY) ## run the slow tests
	$(RUN) -m pytest -m slow $(ARGS)

test-arithmetic: $(READY) ## run the ordinary tests under each instruction set, with 1 and 2 threads; print a table
	$(RUN) tests/support/instruction_sets.py --times $(TIMES) -- -m "not slow" $(WORKERS) $(ARGS)

fuzz: $(READY) ## check 20,000 random problems of every op and loss against float64; results in runs/fuzz
	rm -rf runs/fuzz
	FUSED_PO_FUZZ=$(CASES) FUSED_PO_FUZZ_OUT=runs/fuzz $(if $(SEED),FUSED_PO_SEED=$(SEED)) \
		$(RUN) -m pytest tests/fuzz -v -s $(WORKERS) $(ARGS)
	$(RUN) tests/fuzz/fuzz_report.py runs/fuzz -o runs/fuzz

integrations: $(READY) ## test with verl, OpenRLHF, Liger, axolotl and DeepSpeed, each installed in its own folder in .peers
	$(RUN) tests/support/peer_tests.py $(ARGS)

bench: $(READY) ## time forward and backward beside PyTorch and the installed peers; tables and plots in runs/bench
	mkdir -p runs/bench
	$(RUN) -m pytest benchmarks -m "" --benchmark-json=runs/bench/head.json $(ARGS)
	$(RUN) benchmarks/report.py runs/bench/head.json -o runs/bench

peers: $(READY) ## install Liger, so that `make bench` measures it too
	$(RUN) -m pip install $(PIP_INSTALL) -c constraints.txt --no-build-isolation -e '.[bench]'

peer-wheels: $(READY) ## download the peers' wheels for a machine without a network: wheels/peers
	$(RUN) benchmarks/peer_wheels.py fetch

lint: $(READY) ## check formatting, lints, and the types of the public names
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

NO_GPU := gpu-check: torch finds no CUDA GPU. This target runs the whole test suite on one, slow tests included.

gpu-check: $(READY) ## run every test, slow ones too, on a CUDA GPU; fails if there is none
	@$(RUN) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("$(NO_GPU)")'
	$(RUN) -m pytest -m "" $(ARGS)

# The rehearsal has its own environment, with a CUDA build of torch.
OWN_PINS := torch|triton|numpy|setuptools|transformers|huggingface_hub

rehearse: .rehearsal/installed ## run the GPU tests without a GPU, on a stand-in device: tests/support/rehearsal
	.rehearsal/bin/python -m rehearsal $(ARGS)

.rehearsal/installed: setup.py constraints.txt tests/support/rehearsal/constraints.txt tests/support/rehearsal/runtime.c \
		tests/support/rehearsal/build.py
	$(PYTHON) -m venv .rehearsal
	grep -vE '^($(OWN_PINS))=' constraints.txt | cat - tests/support/rehearsal/constraints.txt > .rehearsal/constraints.txt
	.rehearsal/bin/python -m pip install $(PIP_INSTALL) -c .rehearsal/constraints.txt setuptools nvidia-cuda-crt
	.rehearsal/bin/python -m pip install $(PIP_INSTALL) -c .rehearsal/constraints.txt --no-build-isolation -e '.[dev]'
	.rehearsal/bin/python tests/support/rehearsal/build.py
	touch $@

EVIDENCE := $(if $(OUT),--out "$(OUT)") $(if $(FROM),--from "$(FROM)") $(if $(STAGES),--stages "$(STAGES)") \
	$(if $(BUDGET),--budget $(BUDGET)) $(if $(SUITE),--suite $(SUITE)) $(if $(RETRY),--retry) \
	$(if $(KEEP_GOING),--keep-going) $(if $(PLAN),--plan $(PLAN))

gpu-evidence: $(READY) ## run all measurements on a GPU, in calls of under ten minutes that can be resumed: OUT=, PLAN=H100
	@$(RUN) benchmarks/evidence $(EVIDENCE) $(ARGS)

clean: ## remove .venv, builds and caches
	rm -rf .venv .rehearsal .peers build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

OLD := $(PYTHON) is older than Python 3.10. Use a newer one, for example: make PYTHON=python3.12
NO_PIP := $(PYTHON) has no venv or ensurepip. On Debian and Ubuntu: apt install python3-venv. Or use another: make PYTHON=...

.venv/installed: setup.py pyproject.toml constraints.txt fused_po/__init__.py $(wildcard kernels/*/__init__.py)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("$(OLD)")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo '$(NO_PIP)' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install $(PIP_INSTALL) -c constraints.txt setuptools
	.venv/bin/python -m pip install $(PIP_INSTALL) -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

own-packages:
	$(PYTHON) -m pip install $(PIP_INSTALL) --no-deps --no-build-isolation -e .
