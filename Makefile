# Every target does its own set-up in .venv once, except device, which uses what is installed.
PYTHON_IN_VENV := .venv/bin/python
QUICKSTART := runs/quickstart
MINUTES ?= 8
OUT ?= experiments/results
SPARSE := --rate 0.2 0.4 0.6 --kernels pallas_gpu

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-real bench device tune aot memory tables lint setup clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart:  ## continue the pre-training of a real 135M model with SAT, on a CPU, in minutes
	@scripts/setup.sh base quickstart
	$(PYTHON_IN_VENV) -m scripts.train --config=experiments/quickstart.py --workdir=$(QUICKSTART)

test:  ## run all tests except those that need real weights
	@scripts/setup.sh test
	$(PYTHON_IN_VENV) -m pytest

test-real:  ## test on the quickstart model's real weights, against torch and transformers
	@scripts/setup.sh test bench quickstart
	$(PYTHON_IN_VENV) -m pytest -m real

bench:  ## measure speed against the dense step and against transformers
	@scripts/setup.sh base bench
	$(PYTHON_IN_VENV) -m scripts.benchmark

device:  ## measure what fits in MINUTES=8 on the current GPU; rows in OUT=DIR; PYTHON=python3; no set-up
	$(or $(PYTHON),$(wildcard $(PYTHON_IN_VENV)),python3) -m scripts.device --minutes $(MINUTES) --out $(OUT)

tune:  ## time the kernels on the current GPU or TPU, to choose their tiles and to compare with XLA
	@scripts/setup.sh base
	$(PYTHON_IN_VENV) -m kernels.tune

aot:  ## compile the kernels for absent TPUs and an absent H200; needs ptxas of CUDA on PATH
	@scripts/setup.sh aot
	.venv-aot/bin/python -m kernels.aot

memory:  ## compute the memory of large models' steps, compiled for an absent H200
	@scripts/setup.sh aot
	.venv-aot/bin/python -m scripts.memory $(SPARSE) --model tinyllama-1.1b --rows 8
	.venv-aot/bin/python -m scripts.memory $(SPARSE) --model llama-2-7b
	.venv-aot/bin/python -m scripts.memory $(SPARSE) --model llama-2-7b --optimizer lion --rows 8
	.venv-aot/bin/python -m scripts.memory $(SPARSE) --model llama-2-13b --optimizer lion
	.venv-aot/bin/python -m scripts.memory $(SPARSE) --model llama-2-13b --optimizer lion --rows 8

tables:  ## update the documents' tables and picture from the committed rows
	@scripts/setup.sh base
	$(PYTHON_IN_VENV) -m scripts.tables

lint:  ## run the formatter, linter and type checker, as before a commit
	@scripts/setup.sh test
	$(PYTHON_IN_VENV) -m pre_commit run --all-files

setup:  ## only do the set-up that the other targets do as well
	@scripts/setup.sh base

clean:  ## remove .venv, .venv-aot and the tools' caches, but not runs/
	rm -rf .venv .venv-aot *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
