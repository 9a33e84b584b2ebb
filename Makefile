#   make demo         train a small residual network on real images, on whatever device there is
#   make test         the tests that show that everything works here: minutes
#   make test-all     every case of every test, as CI runs them
#   make slow         the tests that are too slow for every day: hours
#   make fuzz         drawn cases of the operators for MINUTES=10; what fails is kept, and run by make test from then on
#   make mutants      plant small faults, one at a time, and say which test sees each: half an hour
#   make bench        the benchmarks: small on a CPU, whole on a GPU
#   make findings     what other libraries do that one would not guess, run anew from pinned packages: findings/README.md
#   make lint         the style, and the types that users see
#   make clean        remove what the above made
#
# Each sets up an environment in .venv first, and says what it fetches. To use a PyTorch that is there, and no network:
#
#   make demo PYTHON=python3 VENV=
#
# Variables:
#
#   PYTHON=python3       where .venv comes from; its PyTorch is used where it has one
#   VENV=.venv           the environment's folder; empty for PYTHON itself
#   PIP_FLAGS=           flags of pip, such as --extra-index-url URL for the index of PyTorch's CPU builds
#   CONSTRAINTS=         a file of pip's constraints
#   MINUTES=10           of make fuzz
#   PYTEST_FLAGS=-n 2    flags of pytest; -n 2 runs two processes
#   OUT=                 the demo's folder; a new one in runs/ where it is not given

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?=
PIP_FLAGS ?=
PYTEST_FLAGS ?= -n 2
MINUTES ?= 10
OUT ?=

SET_UP = $(PYTHON) make_venv.py $(VENV) $(if $(CONSTRAINTS),--constraints $(CONSTRAINTS))
SOURCES = $(wildcard $(foreach folder,csrc csrc/cpu bench tests/support/aarch64 tests/support/simt,$(addprefix $(folder)/*.,cpp h cu cuh)))
NATIVE = CMakeLists.txt setup.py pyproject.toml make_venv.py $(wildcard csrc/*.* csrc/cpu/*)

ifeq ($(strip $(VENV)),)
RUN = PYTHONPATH=$(CURDIR) $(PYTHON)
READY = build/native.stamp
TEST_READY = $(READY)
ALL_TESTS_READY = $(READY)
else
RUN = $(VENV)/bin/python
READY = $(VENV)/installed.stamp
TEST_READY = $(VENV)/tests.stamp
ALL_TESTS_READY = $(VENV)/all_tests.stamp
endif

.PHONY: help demo test test-all slow fuzz mutants bench lint findings clean

help:
	@sed -n '/^#/!q; s/^# \{0,3\}//p' Makefile

demo: $(READY)
	$(RUN) -m fused_resnet demo $(if $(OUT),--out $(OUT))

# What runs in which tier: tests/support/tiers.py. What measures time runs alone.
test: $(TEST_READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q $(PYTEST_FLAGS) --quick -m "not slow and not alone"
	$(RUN) -m pytest -q --quick -m "alone and not slow"

test-all: $(ALL_TESTS_READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q $(PYTEST_FLAGS) -m "not slow and not alone"
	$(RUN) -m pytest -q -m "alone and not slow"

slow: $(TEST_READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q $(PYTEST_FLAGS) -m slow

fuzz: $(TEST_READY)
	OMP_NUM_THREADS=1 $(RUN) tests/fuzz.py --minutes $(MINUTES)

mutants: $(TEST_READY)
	$(RUN) tests/mutants.py

bench: $(TEST_READY)
	$(RUN) -m pytest -q bench

lint: $(TEST_READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -c "import clang_format; clang_format.clang_format()" --dry-run -Werror $(SOURCES)

findings:
	PYTHON=$(PYTHON) PIP_FLAGS="$(PIP_FLAGS)" bash findings/all.bash

clean:
	rm -rf build .venv runs *.egg-info fused_resnet/*.so fused_resnet/native_*absent.txt

$(VENV)/installed.stamp: $(NATIVE) $(CONSTRAINTS)
	@$(SET_UP) -- $(PIP_FLAGS)
	@touch $@

$(VENV)/tests.stamp: $(VENV)/installed.stamp
	@$(SET_UP) --tests -- $(PIP_FLAGS)
	@touch $@

$(VENV)/all_tests.stamp: $(VENV)/installed.stamp
	@$(SET_UP) --all-tests -- $(PIP_FLAGS)
	@touch $@ $(VENV)/tests.stamp

build/native.stamp: $(NATIVE)
	$(PYTHON) setup.py -q build_native --build-lib . --build-temp build/temp
	mkdir -p build && touch $@
