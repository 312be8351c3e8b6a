# Two jobs, each complete on a machine that has only Python >= 3.11 and make:
#   make demo   train digits with our optimizers beside Adam, SGD and Muon; writes demo/
#   make test   lint, types, docs, tests

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test check lint types docs unit bench clean

demo: $(VENV)/.cli
	$(BIN)/pullback compare digits \
	  --optimizers layerwise-metric,gauss-newton,kronecker,adam:lr=3e-3,sgd:lr=0.1,muon:lr=0.02 \
	  --epochs 20 --seeds 3 --threads 1 --out demo

test: lint types docs unit

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict --quiet --site-dir $(VENV)/site

unit: $(VENV)/.dev
	$(BIN)/python -m pytest --doctest-modules src
	$(BIN)/python -m pytest -n 2

# Not part of the tests: step time over its floor and over Adam's step, peak memory over the gradient's; the figures are
# committed.
bench: $(VENV)/.dev
	$(BIN)/python benchmarks/floor.py
	$(BIN)/python benchmarks/memory.py

# A stamp per set of extras: the environment is made anew when the project file or the pins change.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.cli: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install --quiet -c constraints.txt -e ".[cli]"
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
# The outside reference for products with U^T U; with its dependencies it would ask for torchvision, hence for CUDA.
	$(PIP) install --quiet -c constraints.txt einops opt-einsum linear_operator tqdm
	$(PIP) install --quiet --no-deps curvlinops-for-pytorch==3.0.1 backpack-for-pytorch==1.7.1 einconv unfoldNd
	touch $@ $(VENV)/.cli

clean:
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
