# All commands for users and developers. `make` alone lists them.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
NVCC ?= nvcc
# Three on two cores: a third of the time, tests wait for processes, frames and disks.
TEST_WORKERS ?= 3
JOBS ?= 2
PYTEST_ARGS ?=
PYTEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal --benchmark-disable

BIN := $(VENV)/bin
BUILD := build
DEMO := demo

listed = $(shell grep -v '^\#' $(1))
cxx_in = $(shell find $(1) -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
COMPILED := setup.py pyproject.toml echo_rt/utils/build_info.py csrc/sources.txt $(call cxx_in,csrc bindings)
KERNELS := $(filter %.cu,$(call listed,csrc/sources.txt)) $(wildcard tests/csrc/*.cu)
KERNEL_OBJECTS := $(KERNELS:%.cu=$(BUILD)/kernels/%.o)
GENCODE := $(foreach arch,$(call listed,csrc/architectures.txt),-gencode arch=compute_$(arch),code=sm_$(arch))

# An installed torch is used as it is, with its CUDA; nothing replaces it.
HAS_TORCH := -c 'import sys, torch; sys.exit(tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 10))' 2>/dev/null

.PHONY: help install demo train-demo measure-demo test test-long test-virtual-gpu lint format kernels bench site wheel clean
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 26
	@echo
	@echo "  PYTHON=$(PYTHON)  interpreter of the virtual environment; its torch is used if it is 2.10 or newer"
	@echo "  VENV=$(VENV)  folder of the virtual environment; an existing one is used as it is"
	@echo "  TORCH=$(TORCH)  torch to install if there is none of 2.10 or newer"
	@echo "  JOBS=$(JOBS)  kernels that nvcc compiles at once (make kernels); for make install: MAX_JOBS"
	@echo "  ECHO_RT_BUILD  cuda, emulated or none: how make install builds the kernels; default: what torch and nvcc allow"
	@echo "  ECHO_RT_CUDA_ARCHS  such as 90a or 80,90a: architectures for make install; default: the GPUs seen, or all if there is none"

install: $(VENV)/.installed ## build echo-rt and install it into the virtual environment

demo: $(DEMO)/demo.mp4 ## make 30 seconds of video with a prompt switch from the small model in the package; no GPU needed
	@echo "made $(DEMO)/demo.mp4 and $(DEMO)/demo.png"

train-demo: $(VENV)/.developed ## train the demo model on the CPU, for hours; goes on where it was stopped
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m training

measure-demo: $(VENV)/.developed ## measure what the demo model shows and remembers, for hours; writes docs/memory.md and its pictures
	$(BIN)/python -m training.picture
	$(BIN)/python -m training.measure
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m training.claim
	$(BIN)/python -m training.report

test: $(VENV)/.developed kernels ## run every test; with nvcc on the PATH, compile the kernels too
	$(PYTEST) $(PYTEST_ARGS)

test-long: $(VENV)/.developed wheel ## run what takes hours: wheels, long soaks, ten minutes for each fuzz test, a server under load, then every test, longer variants too, in two other orders, once beside 20 busy processes
	ECHO_RT_LONG_SOAK=1 $(PYTEST) tests/soak $(PYTEST_ARGS)
	ECHO_RT_FUZZ=600 $(PYTEST) -rP -m hypothesis $(PYTEST_ARGS)
	ECHO_RT_FUZZ=600 $(PYTEST) tests/stream/test_hammer.py $(PYTEST_ARGS)
	ECHO_RT_LONG_SERVE=1 $(BIN)/python -m pytest tests/serve $(PYTEST_ARGS)
	$(PYTEST) --long --shuffle 1 $(PYTEST_ARGS)
	$(BIN)/python tests/busy.py 20 env $(PYTEST) --long --shuffle 2 $(PYTEST_ARGS)

test-virtual-gpu: ## run the tests for GPUs without one; PYTHON needs a torch with CUDA and the tests' packages
	PYTHONPATH=tests $(PYTHON) -m virtual_gpu.build
	PYTHONPATH=tests OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PYTHON) -m virtual_gpu.run -m pytest -m cuda $(PYTEST_ARGS)

lint: $(VENV)/.developed ## run the checkers: ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(call cxx_in,csrc bindings tests)

format: $(VENV)/.developed ## apply the formatters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(call cxx_in,csrc bindings tests)

bench: $(VENV)/.developed ## time each operation, a block of the tiny model and the host's own work on a CPU
	$(BIN)/python bench/kernel_times.py --device cpu --backend torch --out build/bench
	$(BIN)/python -m echo_rt bench --device cpu --no-peers --out build/bench
	$(BIN)/python -m pytest bench --benchmark-only

site: $(VENV)/.installed ## build the documentation into build/site; its pages load nothing from other hosts
	$(BIN)/python -m pip install --quiet "echo-rt[site]"
	$(BIN)/python docs/build_site.py

wheel: $(VENV)/.installed ## build the source distribution and manylinux wheels into dist, and try each in an empty environment
	$(BIN)/python -m pip install --quiet "echo-rt[wheel]"
	$(BIN)/python tests/build_wheel.py dist

ifneq ($(shell command -v $(NVCC)),)
kernels: ## compile every kernel for every architecture: warnings and spilled registers are errors
	@$(MAKE) --no-print-directory --jobs $(JOBS) $(KERNEL_OBJECTS)
	@$(PYTHON) bench/registers.py $(KERNEL_OBJECTS:.o=.ptxas)
else
kernels:
	@echo "no $(NVCC) on the PATH: the kernels are not compiled"
endif

clean: ## remove everything that these targets made here
	rm -rf $(BUILD) $(DEMO) dist .venv echo_rt/_C*.so echo_rt/_ops*.so *.egg-info

# ---- the virtual environment, in three steps

# torch first, so that packages that need it find this one.
$(VENV)/.torch:
	@echo "preparing $(VENV), with torch"
	@test -x $(BIN)/python || $(PYTHON) -m venv $$($(PYTHON) $(HAS_TORCH) && echo --system-site-packages) $(VENV)
	@$(BIN)/python $(HAS_TORCH) || $(BIN)/python -m pip install --quiet "$(TORCH)"
	@$(BIN)/python -m pip install --quiet "setuptools>=77" "pybind11>=2.13" ninja
	@touch $@

# The extension is built in this checkout, which may have been cleaned since.
ifeq ($(wildcard echo_rt/_C*.so),)
.PHONY: $(VENV)/.installed
endif
$(VENV)/.installed: $(VENV)/.torch $(COMPILED)
	@echo "compiling and installing echo-rt, which takes minutes"
	@$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	@touch $@

$(VENV)/.developed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet "echo-rt[test,lint]"
	@touch $@

# ---- kernels

-include $(KERNEL_OBJECTS:.o=.d)

$(BUILD)/kernels/%.o: %.cu csrc/architectures.txt Makefile
	@mkdir -p $(@D)
	$(NVCC) -std=c++17 -O3 -lineinfo --Werror all-warnings -Xcompiler -Wall -Xptxas -v $(GENCODE) -Icsrc \
	    -MMD -MP -MF $(@:.o=.d) -c $< -o $@ >$(@:.o=.ptxas) 2>&1 || { cat $(@:.o=.ptxas); exit 1; }

# ---- the demo

$(DEMO)/demo.mp4: $(VENV)/.installed
	@mkdir -p $(@D)
	$(BIN)/echo-rt generate --seconds 30 \
	    --prompt "0:a red ball bouncing in the desert" --prompt "15:a yellow box bouncing by the sea" \
	    --output $@ --contact-sheet $(@:.mp4=.png) --overwrite
