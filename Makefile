# Everything runs in one virtual environment, which is made on first use:
#
#   make embed        embed the proteins of examples/ (FASTA=my.fasta OUT=my.h5 for yours)
#   make test         run the test suite                (PYTEST_ARGS="-k golden" for a part)
#   make lint types   ruff; mypy
#   make test-kernels compile-gate   the GPU kernels in Triton's interpreter; compiled for GPUs that are not here
#   make test-long    what is too long for the whole check: minutes
#   make test-oldest  ops, kernels, model and pretraining under the oldest PyTorch that is supported: downloads gigabytes
#   make cpu-gate     the CPU kernels compiled for every instruction set, their loops held to budgets
#   make cpp-test cpp-test-aarch64   the CPU kernels without Python; those for AArch64 in QEMU
#   make wheel-test   build sdist and wheel, run a part of the suite against the installed wheel
#   make gpu-first-dry-run   what a new GPU will be asked first, as far as it can be asked without one
#   make sanitize     on a GPU: bad memory accesses and races in the kernels, with NVIDIA's compute-sanitizer
#   make pretrain-demo   a corpus of 2,000 real proteins, a small model trained on it, its curves: a few minutes
#   make bench        speed and memory, beside others   (BENCH_ARGS="--quick" for a first look)
#   make bench-sets   the model by instruction set of this CPU, next to others held to the same set
#   make dev          the environment with every development tool
#   make clean        remove the environment and whatever was built
#
# PYTHON=python3.12 picks the interpreter, VENV=folder the environment.

PYTHON ?= python3
VENV ?= .venv
FASTA ?= examples/proteins.fasta
OUT ?= embeddings.h5
# Comes with the package; others: "proteinbert" (the official weights), a folder with a model, an official .pkl, a hub name.
MODEL ?= proteinbert-swissprot
PYTEST_ARGS ?=
BENCH_ARGS ?=
DEMO ?= pretrain-demo
TRITONS ?= 3.9.0 3.6.0
# Others that run the kernels for Hopper, of which these alone are compiled.
HOPPER_TRITONS ?= 3.7.1

BIN := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --constraint $(CONSTRAINTS)
SOURCES := setup.py pyproject.toml constraints.txt proteinbert_fast/_version.py $(wildcard csrc/* csrc/cpu/*)

.PHONY: help embed test test-long test-marked-long test-kernels test-kernel-tools test-oldest compile-gate cpu-gate cpp-test cpp-test-aarch64 gpu-first-dry-run sanitize lint types wheel-test pretrain-demo bench bench-sets dev clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# Runs before anything is installed, on whatever $(PYTHON) is: plain code that any Python 3 can read.
define CHECK_MACHINE
import os, shutil, sys, sysconfig

def need(good, line):
    if not good:
        sys.exit("make: " + line)

version = ".".join(str(n) for n in sys.version_info[:3])
need((3, 11) <= sys.version_info[:2] <= (3, 13),
     sys.executable + " is Python " + version + ", but 3.11, 3.12 or 3.13 is needed: say which, as in 'make PYTHON=python3.12'")
try:
    import ensurepip, venv
except ImportError:
    need(False, "this Python cannot make virtual environments: install its venv package (on Debian and Ubuntu: apt install python3-venv)")
compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++").split()[0]
need(shutil.which(compiler),
     "no C++ compiler (" + compiler + "), which the tokenizer is built with: install one (on Debian and Ubuntu: apt install g++), or set CXX")
need(os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")),
     "Python.h is missing, which the tokenizer is built with: install Python's headers (on Debian and Ubuntu: apt install python3-dev)")
endef
export CHECK_MACHINE

# Stamps: a step runs again only when what it was made from is newer.
$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) here: install Python 3.11 to 3.13, or say where it is, as in 'make PYTHON=/path/to/python3'" >&2; exit 1; }
	@$(PYTHON) -c "$$CHECK_MACHINE"
	@echo "==> making the environment $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.build-tools: $(VENV)/.made constraints.txt
	$(PIP_INSTALL) --quiet setuptools pybind11
	@touch $@

# The build tools stand in the environment, so that building again needs no download.
$(VENV)/.base: $(VENV)/.build-tools $(SOURCES)
	@echo "==> installing proteinbert_fast (the first time with PyTorch, which is large: minutes)"
	$(PIP_INSTALL) --no-build-isolation --editable .
	@touch $@

# By name, which the editable package satisfies: it is compiled once.
$(VENV)/.test: $(VENV)/.base
	@echo "==> installing what the tests need"
	$(PIP_INSTALL) --quiet 'proteinbert-fast[test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	@echo "==> installing every development tool"
	$(PIP_INSTALL) --quiet 'proteinbert-fast[dev]'
	@touch $@

embed: $(VENV)/.base
	$(BIN)/proteinbert-fast embed $(FASTA) --output $(OUT) --overwrite --model $(MODEL)

# On all cores (at most 8: each process holds PyTorch), one thread each: threads of several processes would wait for
# each other. What must not depend on threads asks for its own, which sleep while they wait: spinning, they take the
# core from those they wait for.
ONE_THREAD := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
IN_PARALLEL := $(ONE_THREAD) PYTEST_XDIST_AUTO_NUM_WORKERS=$(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
ALL_CORES := --numprocesses auto --dist worksteal

test: $(VENV)/.test
	$(IN_PARALLEL) $(BIN)/python -m pytest $(ALL_CORES) $(PYTEST_ARGS)

# What takes too long for every change; CONTRIBUTING.md lists it. With Triton, so that no test marked long is left out.
test-long: test-marked-long $(patsubst %,compile-gate-long-%,$(filter-out $(lastword $(TRITONS)),$(TRITONS)))

test-marked-long: $(VENV)/triton-$(lastword $(TRITONS))
	$(RUN_KERNELS) --long only --durations 0 $(PYTEST_ARGS)

# Without a GPU, in Triton's interpreter, with the newest Triton and the oldest supported, each in a folder of its own.
# The last of them goes through everything, the others through all kernels on fewer inputs. What is more than kernels and
# model (emulator, gate, report, tuning) is a target of its own, for `make --jobs`.
KERNEL_TOOLS := $(patsubst %,tests/ops/kernels/test_%.py,local_block_hopper local_block_backward_hopper compile_gate gpu_report gpu_first tuning)
KERNELS_ALONE := $(patsubst %,tests/ops/kernels/test_%.py,operations gradients losses launching warm)
RUN_KERNELS = $(IN_PARALLEL) TRITON_INTERPRET=1 PYTHONPATH=$(abspath $<) $(BIN)/python -m pytest -p no:cacheprovider $(ALL_CORES)

.PRECIOUS: $(VENV)/triton-%
$(VENV)/triton-%: $(VENV)/.test
	$(PIP_INSTALL) --quiet --no-deps --target $@ triton==$*

test-kernels: $(TRITONS:%=test-kernels-%) test-kernel-tools

test-kernels-%: $(VENV)/triton-%
	$(RUN_KERNELS) $(if $(filter $(lastword $(TRITONS)),$*),tests/ops/kernels $(KERNEL_TOOLS:%=--ignore=%),$(KERNELS_ALONE) -m "not slow") $(PYTEST_ARGS)

test-kernel-tools: $(VENV)/triton-$(lastword $(TRITONS))
	$(RUN_KERNELS) $(KERNEL_TOOLS) $(PYTEST_ARGS)

# In an environment of its own, which PyTorch's CUDA build brings its Triton into. That PyTorch pins setuptools itself.
OLDEST_VENV ?= .venv-oldest
OLDEST_TORCH := $(shell sed -n 's/.*"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)
OLDEST_TESTS := tests/test_model.py tests/test_export.py tests/test_packing.py tests/pretraining tests/ops
RUN_OLDEST = $(IN_PARALLEL) $(OLDEST_VENV)/bin/python -m pytest -p no:cacheprovider $(ALL_CORES)

test-oldest:
	@mkdir -p build
	sed -e 's/^torch==.*/torch==$(OLDEST_TORCH)/' -e '/^setuptools==/d' constraints.txt > build/oldest.txt
	$(MAKE) VENV=$(OLDEST_VENV) CONSTRAINTS=build/oldest.txt $(OLDEST_VENV)/.test
	@$(OLDEST_VENV)/bin/python -c "import torch, triton; print('==> torch', torch.__version__, 'triton', triton.__version__)"
	$(RUN_OLDEST) -m "not slow" $(OLDEST_TESTS) --ignore=tests/ops/kernels $(PYTEST_ARGS)
	TRITON_INTERPRET=1 $(RUN_OLDEST) tests/ops/kernels $(KERNEL_TOOLS:%=--ignore=%) $(PYTEST_ARGS)

compile-gate: $(TRITONS:%=compile-gate-%) $(HOPPER_TRITONS:%=hopper-gate-%)

compile-gate-%: $(VENV)/triton-%
	OMP_NUM_THREADS=1 PYTHONPATH=$(abspath $<) $(BIN)/python -m tests.ops.kernels.compile_gate $(if $(filter $(lastword $(TRITONS)),$*),,--brief 90)

compile-gate-long-%: $(VENV)/triton-%
	OMP_NUM_THREADS=1 PYTHONPATH=$(abspath $<) $(BIN)/python -m tests.ops.kernels.compile_gate --brief 80 100

hopper-gate-%: $(VENV)/triton-%
	OMP_NUM_THREADS=1 PYTHONPATH=$(abspath $<) $(BIN)/python -m tests.ops.kernels.compile_gate --hopper

gpu-first-dry-run: $(VENV)/triton-$(lastword $(TRITONS))
	PYTHONPATH=$(abspath $<) $(BIN)/python benchmarks/gpu_first.py --dry-run

# Needs a compiler and objdump, no processor with the instruction sets. CXX=clang++-14 tries another compiler.
cpu-gate: $(VENV)/.made
	$(BIN)/python -m tests.ops.cpu_gate

# The kernels take their threads from libgomp, which PyTorch brings elsewhere; nothing here refers to it by name.
CPP_TEST := tests/cpp/cpu_kernels_test.cpp
CPP_TEST_SOURCES := $(CPP_TEST) $(wildcard tests/cpp/*.h csrc/cpu/*.h)
CPP_TEST_FLAGS := -std=c++17 -O3 -Wall -Wextra -Werror -Wno-psabi -Icsrc $(CPP_TEST) -Wl,--no-as-needed -lgomp
AARCH64_CXX ?= aarch64-linux-gnu-g++
AARCH64_RUN ?= qemu-aarch64-static
AARCH64_ROOT ?= /usr/aarch64-linux-gnu

build/cpp/cpu_kernels_test: $(CPP_TEST_SOURCES)
	@mkdir -p $(@D)
	$(CXX) $(CPP_TEST_FLAGS) -o $@

cpp-test: build/cpp/cpu_kernels_test
	$<

# An old processor, then one with BF16. Whoever lacks the tools need not install them; the whole check does.
cpp-test-aarch64: $(CPP_TEST_SOURCES)
	@missing=; for tool in $(AARCH64_CXX) $(AARCH64_RUN); do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	if [ -n "$$missing" ]; then \
		echo "make: not on PATH:$$missing; the kernels for AArch64 are not tested (on Debian and Ubuntu: apt install g++-aarch64-linux-gnu qemu-user-static)" >&2; \
		[ "$(CI)" != true ]; \
	else \
		set -ex; mkdir -p build/cpp; \
		$(AARCH64_CXX) $(CPP_TEST_FLAGS) -o build/cpp/cpu_kernels_test_aarch64; \
		$(AARCH64_RUN) -L $(AARCH64_ROOT) -cpu cortex-a72 build/cpp/cpu_kernels_test_aarch64 baseline; \
		$(AARCH64_RUN) -L $(AARCH64_ROOT) -cpu max build/cpp/cpu_kernels_test_aarch64 neon_bf16; \
	fi

# On a machine with a GPU. SANITIZE_PYTHON is a Python that has torch with CUDA, triton, pytest and this package's
# extensions; races are looked for on the smallest inputs, because that is slow. PyTorch's own allocator hides what
# lies beyond an array, so it is off.
SANITIZE_PYTHON ?= $(BIN)/python
SANITIZE_TESTS ?= tests/ops/kernels/test_operations.py tests/ops/kernels/test_model.py
SMALL_TESTS ?= test_every_width or test_linear or test_descriptors or test_same_bits
SANITIZE = PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --target-processes all

sanitize:
	@command -v compute-sanitizer >/dev/null || { echo "make: no compute-sanitizer on PATH: it comes with NVIDIA's CUDA toolkit" >&2; exit 1; }
	@$(SANITIZE_PYTHON) -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || { echo "make: $(SANITIZE_PYTHON) sees no CUDA GPU (SANITIZE_PYTHON=... picks another Python)" >&2; exit 1; }
	$(SANITIZE) --tool memcheck $(SANITIZE_PYTHON) -m pytest -p no:cacheprovider $(SANITIZE_TESTS) $(PYTEST_ARGS)
	$(SANITIZE) --tool racecheck $(SANITIZE_PYTHON) -m pytest -p no:cacheprovider $(SANITIZE_TESTS) -k "$(SMALL_TESTS)" $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

# Run again, it goes on where it was interrupted; it begins anew when $(DEMO)/ is removed.
DEMO_DATA := tests/data/pretraining

pretrain-demo: $(VENV)/.dev
	@mkdir -p $(DEMO)
	$(BIN)/proteinbert-fast build-corpus $(DEMO_DATA)/proteins.fasta.gz -o $(DEMO)/corpus.h5 --annotations $(DEMO_DATA)/go_terms.tsv.gz \
		--ontology $(DEMO_DATA)/go.obo.gz --min-count 20 --validation 0.1 --resume
	$(BIN)/proteinbert-fast pretrain $(DEMO)/corpus.h5 -o $(DEMO)/run --config $(DEMO_DATA)/demo.toml --resume
	$(BIN)/proteinbert-fast plot-pretraining $(DEMO)/run -o $(DEMO)/curves.png
	@echo "==> look at $(DEMO)/curves.png; the model is in $(DEMO)/run/model"

bench: $(VENV)/.dev
	$(BIN)/proteinbert-fast bench $(BENCH_ARGS)

bench-sets: $(VENV)/.dev
	$(BIN)/python benchmarks/instruction_sets.py $(BENCH_ARGS)

dev: $(VENV)/.dev

# The tests run beside no package source: in the unpacked sdist without proteinbert_fast/ and csrc/, so that what is
# imported can only be the installed wheel. That shows the sdist to be complete, too. A smoke part of the suite: `make test`
# tests the same code, and what is asked here is whether all of it is there. The environment has the wheel alone, and finds
# what it requires in $(VENV), where the same requirements were installed.
SMOKE_TESTS := $(patsubst %,tests/%.py,test_package test_golden cli/test_main cli/test_doctor ops/test_isa ops/test_backends)
SMOKE_KERNELS := tests/ops/kernels/test_model.py -k golden

wheel-test: $(VENV)/.dev $(VENV)/triton-$(lastword $(TRITONS))
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python -m tests.wheel_contents dist/*.whl
	@set -eu; \
	temp=$$(mktemp -d); trap 'rm -rf "$$temp"' EXIT; \
	mkdir "$$temp/tree"; \
	tar -xzf dist/*.tar.gz -C "$$temp/tree" --strip-components 1; \
	rm -r "$$temp/tree/proteinbert_fast" "$$temp/tree/csrc" "$$temp/tree/setup.py"; \
	echo "==> installing $$(echo dist/*.whl) into a new environment"; \
	$(PYTHON) -m venv "$$temp/venv"; \
	"$$temp/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps dist/*.whl; \
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(echo "$$temp"/venv/lib/python3*/site-packages)/requirements.pth"; \
	triton=$(abspath $(VENV))/triton-$(lastword $(TRITONS)); \
	cd "$$temp/tree"; \
	"$$temp/venv/bin/python" -c 'import sys, proteinbert_fast as p; assert p.__file__.startswith(sys.prefix), p.__file__; print("==> testing", p.__file__)'; \
	$(IN_PARALLEL) "$$temp/venv/bin/python" -m pytest $(ALL_CORES) -m "not slow" $(SMOKE_TESTS) $(PYTEST_ARGS); \
	$(ONE_THREAD) TRITON_INTERPRET=1 PYTHONPATH="$$triton" "$$temp/venv/bin/python" -m pytest $(SMOKE_KERNELS) $(PYTEST_ARGS)

clean:
	rm -rf .venv .venv-oldest .triton-cache pretrain-demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks embeddings.h5*
	find proteinbert_fast benchmarks tests -name __pycache__ -prune -exec rm -rf {} +
	find proteinbert_fast -name '*.so' -delete
