SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
PIP_INSTALL := -m pip install -qq --disable-pip-version-check
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
# One thread for each process: the models of the tests are small, and threads beyond the cores make them many times slower.
PYTEST := -m pytest -n $(JOBS)
# Handed to the recipe's shell as they are, whatever quotes they hold.
export MODEL IMAGE QUESTION RATIO

.PHONY: help demo test test-oldest train accuracy bench bench-gpu lint format clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

demo: .venv/.installed ## answer a question unpruned and pruned; MODEL=, IMAGE=, QUESTION=, RATIO= are optional
	@.venv/bin/python demo.py $${MODEL:+--model "$$MODEL"} $${IMAGE:+--image "$$IMAGE"} \
		$${QUESTION:+--question "$$QUESTION"} $${RATIO:+--ratio "$$RATIO"}

test: .venv/.installed ## the tests, with the newest transformers; PYTEST_ARGS= is passed on
	OMP_NUM_THREADS=1 .venv/bin/python $(PYTEST) $(PYTEST_ARGS)

test-oldest: .venv-oldest/.installed ## the tests that depend on it, with the oldest supported transformers
	OMP_NUM_THREADS=1 .venv-oldest/bin/python $(PYTEST) -m "not once" $(PYTEST_ARGS)

train: .venv/.installed ## train the small model (training/README.md), hours on a CPU; goes on from its last checkpoint
	.venv/bin/python -m training.train $(TRAIN_ARGS)

accuracy: .venv/.installed ## what pruning costs in answers; ACCURACY_ARGS="--model FOLDER" while the root holds no model
	.venv/bin/python benchmarks/accuracy.py --ablations $(ACCURACY_ARGS)

bench: .venv/.installed ## time selection, prefill and decoding on this CPU; BENCH_ARGS= is passed on
	.venv/bin/python benchmarks/selection.py --output benchmarks/results $(BENCH_ARGS)
	.venv/bin/python benchmarks/prefill.py --output benchmarks/results $(BENCH_ARGS)
	.venv/bin/python benchmarks/decode.py --output benchmarks/results $(BENCH_ARGS)

bench-gpu: ## all GPU tests and measurements, on a CUDA machine with what is installed there
	$(PYTHON) benchmarks/gpu.py $(BENCH_ARGS)

lint: .venv/.installed ## check style
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: .venv/.installed ## repair style
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean: ## remove environments, caches and results
	rm -rf .venv .venv-oldest .pytest_cache .ruff_cache build demo_output *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: EXTRA :=
.venv-oldest/.installed: EXTRA := "transformers==5.17.*"

.venv/.installed .venv-oldest/.installed: pyproject.toml
	@echo "Installing into $(@D) (once, about a minute)"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python $(PIP_INSTALL) -e ".[test]" $(EXTRA)
	@touch $@
