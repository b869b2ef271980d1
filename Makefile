PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help demo test slow lint format types check bench compile-target kernel-table gpu-check clean
help:
	@echo "make demo    install into $(VENV), fetch a small real model, answer several prompts at once"
	@echo "make test    the tests (make slow: those that take minutes; make check: tests, lint, types, slow tests)"
	@echo "make bench   the benchmarks of the README, results as JSON and PNG in results/"
	@echo "make kernel-table   compile every kernel for GPUs that are not here: registers, spills, shared memory"
	@echo "make gpu-check      on a machine with a GPU: tests and benchmarks of the kernels (installs nothing)"

# A stamp for what is installed: again when pyproject.toml changes.
$(VENV)/.installed: pyproject.toml
	@echo "Setting up $(VENV) (once) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "jaxpaged needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.test-installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,bench]'
	@touch $@

# The GPU's compilers, without a GPU and without CUDA's libraries, in a folder of their own: JAX would look for a GPU at every
# start if they lay beside it. The same version as JAX's, whatever that is here.
COMPILE_TARGET = $(VENV)/compile-target
$(VENV)/.compile-target-installed: $(VENV)/.test-installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(COMPILE_TARGET) \
	    $$($(BIN)/python -c 'import jax; print(*(f"jax-cuda13-{x}=={jax.__version__}" for x in ("plugin", "pjrt")))') \
	    'nvidia-cuda-nvcc>=13,<14' 'nvidia-nvvm>=13,<14' 'nvidia-cuda-crt>=13,<14' 'nvidia-cuda-runtime>=13,<14'
	@touch $@

compile-target: $(VENV)/.compile-target-installed

kernel-table: compile-target
	mkdir -p results
	$(BIN)/python -m benchmarks.compile_report --json results/compile.json --markdown results/compile.md

# With whatever Python has JAX for the GPU: nothing is installed.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check --out results/gpu

demo: $(VENV)/.installed
	@$(BIN)/jaxpaged demo

# Many small models, each by itself: two at a time. The others share servers and compiled engines, and some watch the clock.
FAMILIES = tests/test_families.py tests/test_convert.py tests/test_sharding.py tests/test_parallel.py
pytest = $(BIN)/python -m pytest -m $(1) $(FAMILIES:%=--ignore=%) && $(BIN)/python -m pytest -m $(1) -n 2 $(FAMILIES)

test: $(VENV)/.test-installed
	$(call pytest,"not slow")

slow: $(VENV)/.test-installed
	$(call pytest,slow)

lint: $(VENV)/.test-installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.test-installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(VENV)/.test-installed
	$(BIN)/pyright --pythonpath $(BIN)/python

check: test lint types slow

bench: $(VENV)/.test-installed
	mkdir -p results
	$(BIN)/python -m benchmarks.scheduler --json results/scheduler.json --plot results/scheduler.png
	$(BIN)/python -m benchmarks.startup --json results/startup.json
	$(BIN)/python -m benchmarks.latency --json results/latency.json
	$(BIN)/python -m benchmarks.throughput --json results/throughput.json
	$(BIN)/python -m benchmarks.sampler --json results/sampler.json
	for part in null soak leave model; do $(BIN)/python -m benchmarks.serving $$part --json results/serving-$$part.json || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
