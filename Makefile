# make demo: install into .venv and prune the model that ships with pared. make test: install and run the tests.
# make llamacpp-test: install llama.cpp's bindings and airllm into .venv-llamacpp and run the tests that need them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A CPU build where an index or a wheel folder offers one; plain torch would bring gigabytes of CUDA along.
TORCH ?= torch==2.13.0
export OMP_NUM_THREADS ?= 2
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint slow llamacpp-test clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e ".[test]"
	touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/pared demo

test: lint
	$(BIN)/python -m pytest -m "not slow and not gpu and not vllm and not llamacpp"

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "slow"

# llama-cpp-python has no wheel: pip compiles it with cmake and a C++ compiler, which takes minutes and is done once.
LLAMACPP := .venv-llamacpp
LLAMACPP_WHEELS ?=

$(LLAMACPP)/.installed: pyproject.toml
	$(PYTHON) -m venv $(LLAMACPP)
	$(LLAMACPP)/bin/python -m pip install --quiet "$(TORCH)"
	$(LLAMACPP)/bin/python -m pip install --quiet $(if $(LLAMACPP_WHEELS),--find-links $(LLAMACPP_WHEELS)) -e ".[llamacpp]" pytest
	touch $@

llamacpp-test: $(LLAMACPP)/.installed
	$(LLAMACPP)/bin/python -m pytest -m llamacpp

clean:
	rm -rf $(VENV) $(LLAMACPP) demo-output
