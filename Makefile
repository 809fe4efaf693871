# The whole developer interface. `make demo` and `make test` set everything up by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NATIVE := CMakeLists.txt $(wildcard src/netdecouple/kernels/*.cpp src/netdecouple/kernels/*.h)

DOCS := $(VENV)/.ready-docs

.PHONY: demo test quick lint docs benchmark clean

# the constraints are for what builds the package as well; pip has had two names for that
$(READY): export PIP_CONSTRAINT := constraints.txt
$(READY): export PIP_BUILD_CONSTRAINT := constraints.txt
$(READY): pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "netdecouple needs Python 3.11 or newer; set PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test,lint]'
	touch $@

$(DOCS): $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@

demo: $(READY)  ## decouple the network that comes with the package; results in out/demo
	$(BIN)/netdecouple demo --output out/demo

test: $(READY)  ## every test, quick ones first; those marked `shared` need ../shared
	$(BIN)/python -m pytest -q -m 'not shared and not slow'
	$(BIN)/python -m pytest -q -m 'shared or slow'

quick: $(READY)  ## the tests that need no pretrained networks
	$(BIN)/python -m pytest -q -m 'not shared and not slow'

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check src tests benchmarks examples docs
	$(BIN)/ruff format --check src tests benchmarks examples docs
	$(BIN)/mypy

docs: $(DOCS)  ## the documentation, in out/site; a broken link or anchor is an error
	$(BIN)/python docs/pictures.py docs/generated
	$(BIN)/python docs/tables.py docs/generated
	PYTHONPATH=docs $(BIN)/zensical build --clean --strict

benchmark: $(READY)  ## the accuracy table of the README; needs ../shared
	$(BIN)/python benchmarks/accuracy.py

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache .hypothesis
