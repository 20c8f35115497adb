# Every target sets itself up: the first one on a fresh machine makes .venv, installs what is pinned, and builds.
# PYTHON names the interpreter to start from (3.10 or later).
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test test-gpu-emulated install lint bench data gpu wheel clean

demo: install
	$(PY) -m fasttx demo

# In two processes of one thread each: most of it is Python's own work. Tests that are about threads set their number.
test: install
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

# Every GPU kernel on the emulator and in the compile matrix, at full breadth; `make test` runs a sample of it.
test-gpu-emulated: install
	$(PY) -m pytest tests/gpu -m "emulated_full or not emulated_full"

install: $(VENV)/.built

lint: install
	$(PY) -m ruff check .

bench: install
	$(PY) -m benchmarks --allocators both

# Real texts and images to train on, into data/ (43 MB): what is there is not fetched again.
data: install
	$(PY) -m fasttx.fetch data

# On a machine with a GPU, in ten minutes: the kernels' tests on the device, tuning, benchmarks, a report in results/gpu.
gpu: install
	$(PY) -m benchmarks.gpu

# For installation without a compiler, with CUDA kernels for all architectures where nvcc is: dist/*.whl.
wheel: $(VENV)/.requirements
	FASTTX_CUDA_ARCHS=$${FASTTX_CUDA_ARCHS:-all} $(PY) -m build --wheel --no-isolation

clean:
	rm -rf $(VENV) build dist *.egg-info fasttx/*.so

$(VENV)/.requirements: requirements-dev.txt requirements-demo.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "fasttx needs Python 3.10 or later, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-demo.txt
	touch $@

$(VENV)/.built: $(VENV)/.requirements $(SOURCES)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@
