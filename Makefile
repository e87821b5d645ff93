# make quickstart: the main job on the embedded pair. make test: lint, types, tests. make docs: the site, into build/docs.
# make soak: ten minutes of random kills.
# Each sets up .venv first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart test test-slow soak docs lint format clean

quickstart: $(STAMP)
	$(BIN)/accelerate launch --config_file recipes/accelerate/single.yaml recipes/train.py --config recipes/quickstart/semalign.yaml

test: lint
	$(BIN)/python -m pytest -m "not slow" -n 3 --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

soak: $(STAMP)
	$(BIN)/python benchmarks/soak.py

docs: $(STAMP)
	$(BIN)/python -m sphinx -q -W --keep-going docs build/docs

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy hf_semalign

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(STAMP): setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
