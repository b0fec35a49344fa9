# Everything a user or a developer runs. `make` alone lists it.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
NVCC ?= nvcc
TEST_WORKERS ?= 2
JOBS ?= 2
PYTEST_ARGS ?=
PYTEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --benchmark-disable

BIN := $(VENV)/bin
BUILD := build
DEMO := demo

listed = $(shell grep -v '^\#' $(1))
cxx_in = $(shell find $(1) -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
COMPILED := setup.py pyproject.toml echo_rt/utils/build_info.py csrc/sources.txt $(call cxx_in,csrc bindings)
KERNELS := $(filter %.cu,$(call listed,csrc/sources.txt)) $(wildcard tests/csrc/*.cu)
KERNEL_OBJECTS := $(KERNELS:%.cu=$(BUILD)/kernels/%.o)
GENCODE := $(foreach arch,$(call listed,csrc/architectures.txt),-gencode arch=compute_$(arch),code=sm_$(arch))

# A torch that is there already, with its CUDA, is used; nothing replaces it.
HAS_TORCH := -c 'import sys, torch; sys.exit(tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 10))' 2>/dev/null

.PHONY: help install demo test test-long test-virtual-gpu lint format kernels bench clean
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 26
	@echo
	@echo "  PYTHON=$(PYTHON)  interpreter that the environment is made of; its torch is used if it has one >= 2.10"
	@echo "  VENV=$(VENV)  where the environment lies; one that is there already is used as it is"
	@echo "  TORCH=$(TORCH)  what is installed where there is no torch >= 2.10"
	@echo "  JOBS=$(JOBS)  kernels that nvcc compiles side by side; MAX_JOBS is the same for what install compiles"
	@echo "  ECHO_RT_BUILD  cuda, emulated or none: what install makes of the kernels; unset, what torch and nvcc allow"
	@echo "  ECHO_RT_CUDA_ARCHS  such as 90a or 80,90a: what install compiles for; unset, the GPUs seen, or all if none is"

install: $(VENV)/.installed ## echo-rt, compiled, in an environment of its own

demo: $(DEMO)/demo.mp4 ## a 20-second video with a prompt switch, from a tiny random model, on the CPU if need be
	@echo "made $(DEMO)/demo.mp4 and $(DEMO)/demo.png"

test: $(VENV)/.developed kernels ## every test; kernels are compiled where nvcc is
	$(PYTEST) $(PYTEST_ARGS)

test-long: $(VENV)/.developed ## what takes hours: long soaks, then every test in two other orders, once beside 20 busy processes
	ECHO_RT_LONG_SOAK=1 $(PYTEST) tests/soak $(PYTEST_ARGS)
	$(PYTEST) --shuffle 1 $(PYTEST_ARGS)
	$(BIN)/python tests/busy.py 20 env $(PYTEST) --shuffle 2 $(PYTEST_ARGS)

test-virtual-gpu: ## the tests for GPUs, without one; PYTHON must have a torch with CUDA, and what the tests need
	PYTHONPATH=tests $(PYTHON) -m virtual_gpu.build
	PYTHONPATH=tests OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PYTHON) -m virtual_gpu.run -m pytest -m cuda $(PYTEST_ARGS)

lint: $(VENV)/.developed ## what the formatters and checkers object to
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(call cxx_in,csrc bindings tests)

format: $(VENV)/.developed ## let the formatters decide
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(call cxx_in,csrc bindings tests)

bench: $(VENV)/.developed ## time what has a benchmark
	$(BIN)/python -m pytest bench --benchmark-only

ifneq ($(shell command -v $(NVCC)),)
kernels: ## every kernel for every GPU architecture: warnings and spilled registers are errors
	@$(MAKE) --no-print-directory --jobs $(JOBS) $(KERNEL_OBJECTS)
	@$(PYTHON) bench/registers.py $(KERNEL_OBJECTS:.o=.ptxas)
else
kernels:
	@echo "no $(NVCC) on the PATH: the kernels are not compiled"
endif

clean: ## remove what was built, made or installed here
	rm -rf $(BUILD) $(DEMO) .venv echo_rt/_C*.so echo_rt/_ops*.so *.egg-info

# ---- the environment, in three steps

# torch first: what needs it is then content with the one that is there.
$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $$($(PYTHON) $(HAS_TORCH) && echo --system-site-packages) $(VENV)
	$(BIN)/python $(HAS_TORCH) || $(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "setuptools>=77" "pybind11>=2.13" ninja
	@touch $@

# The extension is compiled into this checkout, which may have been cleaned since.
ifeq ($(wildcard echo_rt/_C*.so),)
.PHONY: $(VENV)/.installed
endif
$(VENV)/.installed: $(VENV)/.torch $(COMPILED)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
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

$(DEMO)/tiny: | $(VENV)/.installed
	$(BIN)/echo-rt tiny $@

$(DEMO)/demo.mp4: $(VENV)/.installed | $(DEMO)/tiny
	$(BIN)/echo-rt generate --model $(DEMO)/tiny --checkpoint $(DEMO)/tiny/echo_infinity.pt --seconds 20 \
	    --prompt "0:a red fox in the snow" --prompt "10:the fox dives into a lake" \
	    --output $@ --contact-sheet $(@:.mp4=.png)
