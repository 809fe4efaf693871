# The whole developer interface. `make demo` and `make test` set everything up by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NATIVE := CMakeLists.txt $(wildcard src/netdecouple/kernels/*.cpp src/netdecouple/kernels/*.h)

EXTRAS := $(VENV)/.ready-extras
TOOLS := $(VENV)-tools
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement
COMPILE := $(TOOLS)/bin/uv pip compile --universal --generate-hashes --no-annotate --no-strip-extras --quiet \
    --custom-compile-command 'make lock' $(UPGRADE)

# tests that compute, for other processors than this one: those of arithmetic, and those of what is built on it
ARITHMETIC := tests/families tests/fitting tests/kernels tests/test_moments.py tests/test_convolution.py
COMPUTE := $(ARITHMETIC) tests/planning tests/test_api.py

# what to start the quick and the other tests with: `.ci/run` gives each a core
QUICK :=
SLOW :=

.PHONY: demo test covered slow quick processors lint docs benchmark extras lock release audit mutants clean

$(READY): pyproject.toml requirements/develop.txt $(NATIVE)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "netdecouple needs Python 3.11 or newer; set PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) requirements/develop.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

$(EXTRAS): $(READY) requirements/extras.txt
	$(INSTALL) requirements/extras.txt
	touch $@

$(TOOLS)/.ready: requirements/tools.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --disable-pip-version-check --require-hashes --requirement $<
	touch $@

demo: $(READY)  ## decouple the network that comes with the package; results in out/demo
	$(BIN)/netdecouple demo --output out/demo

test: covered slow  ## every test, quick ones first; those marked `shared` need ../shared

covered: $(READY)  ## the quick tests, which must run 95% of the engine
	$(QUICK) $(BIN)/python -m pytest -q -m 'not shared and not slow' --cov --durations=15

slow: $(READY)  ## the other tests
	$(SLOW) $(BIN)/python -m pytest -q -m 'shared or slow' --durations=30

quick: $(READY)  ## the tests that need no pretrained networks
	$(BIN)/python -m pytest -q -m 'not shared and not slow'

processors: $(READY)  ## the tests that compute, as processors without AVX-512 (one thread) and without AVX2 (two) run them
	$(QUICK) $(BIN)/python -m tests.another_processor avx2 1 -m 'not shared and not slow' $(COMPUTE)
	$(QUICK) $(BIN)/python -m tests.another_processor baseline 2 -m 'not shared and not slow' $(ARITHMETIC)

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check src tests benchmarks examples docs
	$(BIN)/ruff format --check src tests benchmarks examples docs
	$(BIN)/mypy

docs: $(EXTRAS)  ## the documentation, in out/site; a broken link or anchor is an error
	$(BIN)/python docs/pictures.py docs/generated
	$(BIN)/python docs/tables.py docs/generated
	PYTHONPATH=docs $(BIN)/zensical build --clean --strict

benchmark: $(READY)  ## the accuracy table of the README; needs ../shared
	$(BIN)/python benchmarks/accuracy.py

release: $(READY) $(TOOLS)/.ready  ## sources, wheel, bill of materials and checksums, in out/dist
	rm -rf out/dist out/environment
	$(TOOLS)/bin/python -m build --no-isolation --outdir out/dist
	case $$(uname) in Linux) PATH="$(TOOLS)/bin:$$PATH" auditwheel repair --wheel-dir out/dist out/dist/*-linux_*.whl && rm out/dist/*-linux_*.whl;; esac
	$(PYTHON) -m venv --without-pip out/environment
	$(BIN)/pip --python out/environment/bin/python install --quiet --require-hashes --requirement requirements/run.txt
	$(BIN)/pip --python out/environment/bin/python install --quiet --no-deps --no-index out/dist/*.whl
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type library --output-reproducible \
	    --output-file out/dist/netdecouple.cdx.json out/environment/bin/python
	cd out/dist && sha256sum netdecouple* > SHA256SUMS

audit: $(TOOLS)/.ready  ## known vulnerabilities of all that is locked; asks a service on the network
	$(TOOLS)/bin/pip-audit --strict --require-hashes --disable-pip $(patsubst %,--requirement %,$(wildcard requirements/*.txt))

mutants: $(READY) $(TOOLS)/.ready  ## change the solver in hundreds of ways, and see which changes its tests let pass
	PYTHONPATH=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') $(TOOLS)/bin/mutmut run

extras: $(EXTRAS)  ## what all tests and the documentation want, but PyTorch

lock: $(TOOLS)/.ready  ## write requirements/ again after a change of pyproject.toml; newer versions: UPGRADE=--upgrade
	$(COMPILE) pyproject.toml --python-version 3.11.5 --all-extras --group build --group networks --no-emit-package torch -o requirements/extras.txt
	$(COMPILE) pyproject.toml --python-version 3.11 --constraint requirements/extras.txt --extra test --extra lint --group build -o requirements/develop.txt
	$(COMPILE) pyproject.toml --python-version 3.11 --constraint requirements/extras.txt -o requirements/run.txt
	$(COMPILE) --python-version 3.11 --group tools -o requirements/tools.txt

clean:
	rm -rf $(VENV) $(TOOLS) out mutants .pytest_cache .mypy_cache .ruff_cache .hypothesis
