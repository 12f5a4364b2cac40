# Every target does its own set-up in .venv the first time; a second call does none.
PYTHON_IN_VENV := .venv/bin/python
QUICKSTART := runs/quickstart
SPARSE := --rate 0.2 0.4 0.6 --kernels pallas_gpu

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-real bench tune aot memory tables lint setup clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart:  ## continue the pre-training of a real 135M model with SAT, on a CPU, in minutes
	@scripts/setup.sh base quickstart
	$(PYTHON_IN_VENV) -m scripts.train --config=experiments/quickstart.py --workdir=$(QUICKSTART)

test:  ## all tests but those on real weights
	@scripts/setup.sh test
	$(PYTHON_IN_VENV) -m pytest

test-real:  ## tests on the quickstart model's real weights, against torch and transformers
	@scripts/setup.sh test bench quickstart
	$(PYTHON_IN_VENV) -m pytest -m real

bench:  ## measure speed against the dense step and against transformers
	@scripts/setup.sh base bench quickstart
	$(PYTHON_IN_VENV) -m scripts.benchmark

tune:  ## time the kernels on the GPU or TPU at hand: which tiles, and whether they beat XLA
	@scripts/setup.sh base
	$(PYTHON_IN_VENV) -m kernels.tune

aot:  ## compile the kernels for TPUs and an H200 that are not there; needs ptxas of CUDA on PATH
	@scripts/setup.sh aot
	.venv-aot/bin/python -m kernels.aot

memory:  ## memory of large models' steps, compiled for an H200 that is not there
	@scripts/setup.sh aot
	.venv-aot/bin/python -m scripts.memory $(SPARSE) --model tinyllama-1.1b --rows 8
	.venv-aot/bin/python -m scripts.memory $(SPARSE) --model llama-2-7b
	.venv-aot/bin/python -m scripts.memory $(SPARSE) --model llama-2-7b --optimizer lion --rows 8
	.venv-aot/bin/python -m scripts.memory $(SPARSE) --model llama-2-13b --optimizer lion
	.venv-aot/bin/python -m scripts.memory $(SPARSE) --model llama-2-13b --optimizer lion --rows 8

tables:  ## make the documents' tables anew from the committed rows
	@scripts/setup.sh base
	$(PYTHON_IN_VENV) -m scripts.tables

lint:  ## formatter, linter and types, as before a commit
	@scripts/setup.sh test
	$(PYTHON_IN_VENV) -m pre_commit run --all-files

setup:  ## only the set-up that the other targets do by themselves
	@scripts/setup.sh base

clean:  ## remove .venv, .venv-aot and the tools' caches; runs/ stays
	rm -rf .venv .venv-aot *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
