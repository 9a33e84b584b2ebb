# make demo    train a small residual network on real images, on whatever device there is
# make test    all tests
# make slow    the tests that are too slow for every day
# make bench   the benchmarks: small on a CPU, whole on a GPU
# make findings   what other libraries do that one would not guess, each run anew from its pinned packages: findings/README.md
#
# Both set up .venv first. To use a PyTorch that is already there, and no network:
#
#   make demo PYTHON=python3 VENV=
#   make test PYTHON=python3 VENV=

PYTHON ?= python3
VENV ?= .venv
# A file of pip's constraints, and further flags of pip, such as the index of PyTorch's CPU builds.
CONSTRAINTS ?=
PIP_FLAGS ?=
# Two processes suit a small machine; on a GPU they share it.
PYTEST_FLAGS ?= -n 2
# The demo's folder; a new one in runs/ where it is not given.
OUT ?=

PIP = $(VENV)/bin/python -m pip install -q --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) $(PIP_FLAGS)
NATIVE = CMakeLists.txt setup.py pyproject.toml $(wildcard csrc/*.* csrc/cpu/*)

ifeq ($(strip $(VENV)),)
RUN = PYTHONPATH=$(CURDIR) $(PYTHON)
READY = build/native.stamp
TEST_READY = $(READY)
else
RUN = $(VENV)/bin/python
READY = $(VENV)/installed.stamp
TEST_READY = $(VENV)/tests.stamp
endif

.PHONY: demo test slow bench lint findings clean

demo: $(READY)
	$(RUN) -m fused_resnet demo $(if $(OUT),--out $(OUT))

test: $(TEST_READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q $(PYTEST_FLAGS) -m "not slow and not alone"
	$(RUN) -m pytest -q -m "alone and not slow"

slow: $(TEST_READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q $(PYTEST_FLAGS) -m slow

bench: $(TEST_READY)
	$(RUN) -m pytest -q bench

lint: $(TEST_READY)
	$(RUN) -m ruff check .

findings:
	PYTHON=$(PYTHON) PIP_FLAGS="$(PIP_FLAGS)" bash findings/all.bash

clean:
	rm -rf build .venv runs *.egg-info fused_resnet/*.so fused_resnet/native_*absent.txt

# PyTorch first: the package is built against it, without a second copy in a build environment of its own.
$(VENV)/installed.stamp: $(NATIVE) $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools>=77" wheel ninja cmake "torch>=2.11"
	$(PIP) --no-build-isolation -e .
	@$(VENV)/bin/python -c "from fused_resnet import native as n; print(*(f'native library {x.path.name}: {x.load() or \"built\"}' for x in (n.CUDA, n.CPU)), sep='\n')"
	touch $@

# torchvision has no build that goes with every PyTorch; the tests need no more than its Python code. timm asks for torchvision.
$(VENV)/tests.stamp: $(VENV)/installed.stamp
	$(PIP) --no-build-isolation -e ".[test]"
	$(PIP) --no-deps torchvision timm
	touch $@

build/native.stamp: $(NATIVE)
	$(PYTHON) setup.py -q build_native --build-lib . --build-temp build/temp
	mkdir -p build && touch $@
