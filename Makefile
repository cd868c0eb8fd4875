# Everything runs from .venv in this folder. `make demo` and `make test` are all a newcomer needs.
TORCH  ?= 2.13.0
PYTHON ?= python3
BIN    := .venv/bin

.PHONY: install demo test lint bench-prepare clean

install: .venv/installed-torch-$(TORCH)

.venv/installed-torch-$(TORCH): setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	rm -f .venv/installed-torch-*
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet "torch==$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[test]"
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

clean:
	rm -rf .venv runs build *.egg-info
