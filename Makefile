# Everything runs in .venv, which the first target that needs it makes. PYTHON picks the interpreter.
PYTHON ?= python3
# The first of these that runs: a name on the path need not, it may be a version manager's.
PYTHON_OLDEST ?= python3.12 python3.13 python3.11 python3.10 $(PYTHON)

VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
# Two workers of one thread each: faster here than one worker of two threads, compiling is serial.
WORKERS ?= 2
PYTEST_FLAGS ?= -n $(WORKERS) --durations 10
GPU_FLAGS ?=
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help demo test pytest test-oldest test-wheel sanitize lint types survey regress baseline bench bench-quick bench-error bench-tune reactions paper paper-quick paper-train gpu gpu-wheel plots docs notebooks clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/stamp ## whole models on long inputs, faster or not; three models: report, accuracy (5 minutes)
	$(BIN)/python examples/speed.py
	$(BIN)/python examples/demo.py

test: lint ## lint, types and all tests
	@$(MAKE) --no-print-directory -j 2 types pytest

pytest: $(VENV)/stamp ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS)

test-oldest: $(OLDEST)/stamp ## all tests with the oldest supported torch
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest $(PYTEST_FLAGS)

test-wheel: $(VENV)/stamp ## build both packages into dist, install the wheel into an empty environment, use it there (5 minutes)
	$(BIN)/python -m tests.packages

# The walk over keys in several parts takes much data otherwise, so the workspace is made small.
SANITIZED := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all \
	-DDISTR_PACK_BYTES=65536 -DDISTR_STATE_BYTES=65536
sanitize: $(VENV)/stamp ## tests of the CPU kernel under AddressSanitizer and UndefinedBehaviorSanitizer
	OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 DISTR_TEST_CPU_FLAGS="$(SANITIZED)" \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	$(BIN)/python -m pytest tests/kernels/test_attention_cpu.py tests/kernels/test_backward_cpu.py tests/kernels/test_cpu_bases.py

lint: $(VENV)/stamp ## ruff (lint, format) and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

types: $(VENV)/stamp ## mypy, strict
	$(BIN)/mypy

survey: $(VENV)/stamp ## the pass over the whole zoo of models; rewrites tests/survey/results.csv
	$(BIN)/python -m tests.survey.survey

regress: $(VENV)/stamp ## accuracy of every model of the zoo under every estimator (10 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.regression --workers $(WORKERS) --plot regress.png

baseline: $(VENV)/stamp ## measure anew the accuracies that `make regress` holds us to
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.regression --workers $(WORKERS) --update-baseline

bench: $(VENV)/stamp ## time of the CPU kernel, of other libraries beside it, and of our passes (hours; goes on where it stopped)
	$(BIN)/python benchmarks/cpu_attention.py
	$(BIN)/python -m benchmarks.cpu_kernel
	$(BIN)/python -m benchmarks.cpu_backward
	$(BIN)/python -m benchmarks.peers --json benchmarks/results/peers.json
	$(BIN)/python benchmarks/pass_time.py

bench-quick: $(VENV)/stamp ## the CPU kernel beside other libraries, 16 calls only (10 minutes)
	$(BIN)/python -m benchmarks.peers --grid quick

reactions: $(VENV)/stamp ## fetch the optional model of the zoo (75 MB), a BERT of chemical reactions; the gate then measures it too
	$(BIN)/python -m tests.zoo.reactions

bench-error: $(VENV)/stamp ## accuracy of every estimator; rewrites benchmarks/results/estimator_error.json
	$(BIN)/python -m benchmarks.estimator_error

bench-tune: $(VENV)/stamp ## does the budget hold, for every model of the zoo; rewrites benchmarks/results/tuning.json
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.tuning

paper: $(VENV)/stamp ## the paper's tables as measured here, all but training; rewrites docs/paper.md (half an hour; goes on where it stopped)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.paper

paper-train: $(VENV)/stamp ## the tables of trained models, and whether training through the approximation pays (hours; goes on where it stopped)
	$(BIN)/python -m pip install --quiet --editable '.[paper]'
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.paper --train

paper-quick: $(VENV)/stamp ## two small cells of each of them, kept nowhere (2 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.paper --quick

gpu: $(VENV)/stamp ## everything that wants a GPU, unattended and resumable; green without one
	$(BIN)/python -m benchmarks.gpu $(GPU_FLAGS)

gpu-wheel: $(VENV)/stamp ## wheels for a GPU machine without a network, into dist/gpu; the line that runs there
	@$(BIN)/python -m benchmarks.wheels

plots: $(VENV)/stamp ## docs/cpu_speed.png, paper_time.png, finetuned.png, docs/pictures; plots of what `make gpu` measured
	$(BIN)/python -m benchmarks.first_page
	$(BIN)/python -m benchmarks.cpu_plot
	$(BIN)/python -m benchmarks.paper.figures
	$(BIN)/python -m benchmarks.finetune_plot
	@for results in $(wildcard benchmarks/results/*/attention.json); do \
		folder=$$(dirname $$results); \
		$(BIN)/python -m benchmarks.plot $$folder; \
	done

docs: $(VENV)/stamp ## the site, into dist/site; fails where a link or a page is wrong
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

notebooks: $(VENV)/stamp ## run docs/notebooks and keep what they print and draw (2 minutes)
	PYTHONPATH=$(CURDIR) DISTR_MEASURE=0 OMP_NUM_THREADS=1 $(BIN)/python -m nbconvert --to notebook --execute \
		--inplace --ExecutePreprocessor.record_timing=False docs/notebooks/*.ipynb

clean: ## remove the environments and everything generated
	rm -rf $(VENV) $(OLDEST) regress.png build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache \
		.hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/stamp: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable '.[zoo,integrations,docs,dev]'
	touch $@

# torch 2.11 and its Triton 3.6 have wheels for Python 3.10 to 3.14; that Triton's interpreter fails with numpy >= 2.4.
$(OLDEST)/stamp: pyproject.toml
	@for python in $(PYTHON_OLDEST); do \
		$$python -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' \
			2>/dev/null && { echo "$$python -m venv $(OLDEST)"; exec $$python -m venv $(OLDEST); }; \
	done; \
	echo 'No Python from 3.10 to 3.14 runs here, of: $(PYTHON_OLDEST).' \
		'Install one, or name one: make test-oldest PYTHON_OLDEST=/path/to/python3' >&2; \
	exit 1
	$(OLDEST)/bin/python -m pip install 'torch==2.11.*' 'numpy<2.4' --editable '.[zoo,integrations,docs,dev]'
	touch $@
