# Everything runs from .venv in this folder. `make demo` and `make test` are all a newcomer needs.
TORCH  ?= 2.13.0
PYTHON ?= python3
BIN    := .venv/bin

# torchtitan's loss components need nothing else; its requirements are 46 packages and another datasets
TORCHTITAN := $(foreach wheel,torchtitan==0.3.0 spmd_types==0.2.3 tyro==1.0.17,"$(wheel); python_version >= '3.11'")

CSRC   := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: install demo test test-gpu lint bench-prepare bench-loss bench-gpu clean

install: .venv/extension-built

.venv/installed-torch-$(TORCH): setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	rm -f .venv/installed-torch-*
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet "torch==$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[test]"
	$(BIN)/python -m pip install --quiet --no-deps $(TORCHTITAN)
	touch $@

# without isolation torch is there when the extension is compiled; where it cannot be, one line says why
.venv/extension-built: .venv/installed-torch-$(TORCH) $(CSRC)
	$(BIN)/python setup.py --quiet build_ext --inplace --build-temp build/editable
	touch $@

demo: install
	$(BIN)/python -m whp_fast.demo

test: install
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench-prepare: install
	$(BIN)/python -m benchmarks.prepare --json benchmarks/results/prepare.json

bench-loss: install
	$(BIN)/python -m benchmarks.loss --check --json benchmarks/results/loss_cpu.json --pictures kernels/images

# on a machine with a CUDA GPU; RESULTS holds one file a benchmark, with device, versions, command and commit
RESULTS ?= benchmarks/results

test-gpu: install
	$(BIN)/python -m benchmarks.gpu_tests --json $(RESULTS)/tests_cuda.json

bench-gpu: install
	$(BIN)/python -m benchmarks.loss --device cuda --json $(RESULTS)/loss_cuda.json --pictures kernels/images
	$(BIN)/python -m benchmarks.layers --device cuda --json $(RESULTS)/layers_cuda.json --pictures benchmarks/images
	$(BIN)/python -m benchmarks.fp8 --device cuda --json $(RESULTS)/fp8_cuda.json
	$(BIN)/python -m benchmarks.seven_b --start-up --json $(RESULTS)/seven_b_cuda.json
	$(BIN)/python -m benchmarks.results_page --folder $(RESULTS)

clean:
	rm -rf .venv runs build *.egg-info kernels/whp_kernels/_C.*
