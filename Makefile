# `make demo` and `make test` need Python 3.11, 3.12 or 3.13 and nothing else. PYTHON=python3.13 has an
# environment of its own, .venv-3.13, beside .venv, which is that of python3.
ifdef PYTHON
VERSION := $(shell $(PYTHON) -c 'import sys; print("-%d.%d" % sys.version_info[:2])')
$(if $(VERSION),,$(error PYTHON=$(PYTHON) does not run: name an installed Python))
endif
PYTHON ?= python3
VENV ?= .venv$(VERSION)
BIN := $(VENV)/bin
RUN := $(BIN)/python -m avcl_jax.main
WORKDIR ?= runs/demo
SEED ?= 0
# Memory in pages of 2 MB: on a CPU the system otherwise spends a fifth of the training on clearing
# small ones, because XLA returns a step's memory after each step.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
# Files of tests side by side, each in one process, because its fixtures are costly.
PYTEST := -m pytest -n auto --maxprocesses 8 --dist loadfile

.PHONY: demo test slow reliability interop lint types notebook colab site clean

demo: $(VENV)/demo-ready
	$(BIN)/avcl-data demo --out data/foley
	$(RUN) --config=configs/pretrain.py --config.seed=$(SEED) --workdir=$(WORKDIR)
	$(RUN) --config=configs/evaluate.py:demo --workdir=$(WORKDIR)
	$(RUN) --config=configs/export.py --workdir=$(WORKDIR)

# Small computations: optimising their machine code takes longer than running it.
test: $(VENV)/test-ready
	XLA_FLAGS="$$XLA_FLAGS --xla_backend_optimization_level=0" $(BIN)/python $(PYTEST)

# The tests that take minutes each.
slow: $(VENV)/test-ready
	$(BIN)/python $(PYTEST) -m slow

# The tests of stopped and killed runs, with 20 random kills each; writes the table of the page.
reliability: $(VENV)/test-ready
	AVCL_JAX_KILLS=20 AVCL_JAX_TABLE=docs/reliability.md \
	    $(BIN)/python -m pytest -m "slow or not slow" tests/training/test_reliability*.py

# Apache Beam, object stores, TensorFlow, PyTorch, compilers for TPUs and GPUs: packages of the
# extras, in an environment of their own. PyTorch's tests run in a process of their own: it and
# TensorFlow bring two OpenMPs.
interop: $(VENV)-interop/ready
	$(VENV)-interop/bin/python $(PYTEST) -m interop
	$(VENV)-interop/bin/python $(PYTEST) -m torch

lint: $(VENV)/test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/test-ready
	$(BIN)/mypy

# Notebooks are generated from their sources; the slow tests execute them.
notebook: $(VENV)/test-ready
	$(BIN)/jupytext --to ipynb notebooks/*.py

# Notebooks, and the tests that newer versions of Python and JAX are most likely to break; in Colab's
# Python: make colab PYTHON=python3.12.
colab: $(VENV)/test-ready
	$(BIN)/python $(PYTEST) -m slow tests/test_notebook.py
	XLA_FLAGS="$$XLA_FLAGS --xla_backend_optimization_level=0" $(BIN)/python $(PYTEST) \
	    tests/models/test_remat.py tests/objectives/test_many_devices.py tests/training/test_step.py \
	    tests/training/test_loop.py tests/test_export.py tests/data/test_records.py

# The documentation as a site: open site/index.html, or serve site/ for its search.
site: $(VENV)-docs/ready $(VENV)/demo-ready
	$(VENV)-docs/bin/python docs/stage_site.py
	$(BIN)/python docs/command_options.py >> build/docs/options.md
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict
	$(VENV)-docs/bin/python docs/stage_site.py --check

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The package too, by a link to this folder: its command, and its modules from any folder.
$(VENV)/demo-ready: requirements.txt setup.py | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -e .
	touch $@

$(VENV)/test-ready: requirements-dev.txt requirements.txt setup.py | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -e .
	touch $@ $(VENV)/demo-ready

$(VENV)-interop/ready: requirements-interop.txt requirements-tpu-aot.txt requirements-gpu-aot.txt \
    requirements-dev.txt requirements.txt setup.py
	$(PYTHON) -m venv $(VENV)-interop
	$(VENV)-interop/bin/python -m pip install --quiet --disable-pip-version-check \
	    -r requirements-dev.txt -r requirements-interop.txt -e .
	touch $@

$(VENV)-docs/ready: requirements-docs.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-interop $(VENV)-docs $(VENV)-3.* build/docs data runs site
