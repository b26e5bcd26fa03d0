# `make demo` and `make test` are all that a fresh machine needs: each first sets up .venv, once.
PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?= $(shell .ci/pip-flags $(PYTHON))
CONSTRAINTS ?= constraints.txt
OUT ?= demo-out

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: venv demo test test-slow lint docs wheel sbom

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(addprefix --constraint ,$(CONSTRAINTS)) $(PIP_FLAGS) --editable '.[test,docs]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/pqcad demo --out $(OUT)

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the site, in build/site/docs/index.html; what is out of the code is written anew, and a warning is an error
docs: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python docs/support.py
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -c docs . build/site

# dist/pqcad_ao-*.whl with the CPU kernels compiled; without isolation, for they want the headers of .venv's PyTorch
wheel: $(INSTALLED)
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

# what .venv holds, with versions and licences, as CycloneDX; the tool stands apart, so that it is not in it
sbom: $(INSTALLED)
	$(PYTHON) -m venv $(VENV)/sbom
	$(VENV)/sbom/bin/python -m pip install --quiet 'cyclonedx-bom>=7'
	$(VENV)/sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o sbom.json $(BIN)/python
