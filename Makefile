# make demo | test | test-long | lint | clean     (all of them install what they need into .venv first)
# make bench-env     (what `python -m bench.capture` and `bench.train` compare with, in .venv-bench and .venv-bench-train;
#                    what importers are tested against, in .venv-bench-interop)
PYTHON ?= python3
# Where torch comes from. Empty: the package index (on Linux the CUDA build, 3 GB). Without an NVIDIA GPU
# give the CPU index that pytorch.org's install page names: make demo TORCH_INDEX=URL
TORCH_INDEX ?=
# Processes that run the tests, each on its share of the cores; empty: one on all of them.
TEST_WORKERS ?= 2
VENV := .venv
PYTEST := $(VENV)/bin/python -m pytest $(if $(TEST_WORKERS),-n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder)
PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-long lint check-tools install install-dev bench-env clean

demo: install
	$(VENV)/bin/ggscope run experiment=demo_cpu

test: lint
	$(PYTEST) -m "not long"

test-long: lint
	$(PYTEST)

lint: install-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

check-tools:
	@command -v $(PYTHON) >/dev/null || { echo "missing: $(PYTHON) 3.11-3.13 (Debian: apt install python3)"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { echo "missing: Python 3.11-3.13; $(PYTHON) is $$($(PYTHON) -V 2>&1); name another with PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "missing: Python's venv (Debian: apt install python3-venv)"; exit 2; }
	@command -v $${CC:-cc} >/dev/null || { echo "missing: a C compiler (Debian: apt install build-essential)"; exit 2; }
	@command -v $${CXX:-c++} >/dev/null || { echo "missing: a C++17 compiler (Debian: apt install build-essential)"; exit 2; }

# The tools are only checked where something is to be installed.
$(VENV)/bin/python:
	@$(MAKE) --no-print-directory check-tools
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	@echo "== installing torch; then llama.cpp is compiled, which takes about 6 minutes on 2 cores (once)"
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@touch $@

# With CMAKE_ARGS a wheel that pip made with others will not do.
$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.torch
	$(if $(CMAKE_ARGS),$(PIP) --no-cache-dir --force-reinstall --no-deps llama-cpp-python)
	$(PIP) -e '.[train]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[train,dev]'
	@touch $@

bench-env: .venv-bench/.installed .venv-bench-train/.installed .venv-bench-interop/.installed

.venv-bench/.installed: bench/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep ^torch== $<)"
	.venv-bench/bin/python -m pip install --disable-pip-version-check -r $<
	@touch $@

# torchvision only comes along (nnsight, diffusers); a build of it that does not fit torch's breaks every import.
.venv-bench-train/.installed: bench/requirements-train.txt
	$(PYTHON) -m venv .venv-bench-train
	.venv-bench-train/bin/python -m pip install --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep ^torch== $<)"
	.venv-bench-train/bin/python -m pip install --disable-pip-version-check -r $<
	.venv-bench-train/bin/python -m pip uninstall -y torchvision
	@touch $@

.venv-bench-interop/.installed: bench/requirements-interop.txt
	$(PYTHON) -m venv .venv-bench-interop
	.venv-bench-interop/bin/python -m pip install --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep ^torch== $<)"
	.venv-bench-interop/bin/python -m pip install --disable-pip-version-check -r $<
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
