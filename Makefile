# make demo     watch a model learn to think (CPU is enough)
# make test     lint, type checks and the fast CPU tests
# make lint | bench | sanitize | install | clean
# `demo`, `test` and the others install what they need into .venv first; PYTHON=python3.12 chooses another interpreter.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SANITIZED_TESTS ?= $(patsubst %,tests/test_%.py,\
  cache_layout block_cache bindings gemm gelu kv_append attention attention_far native)

.PHONY: install installed demo test lint bench sanitize clean

# One install at a time: `make test` beside `make demo` in a fresh clone waits for that install and then skips its own.
# --close: a compiler cache's server, which the build may start and which keeps running, must not hold the lock.
install:
	@flock --nonblock Makefile true || echo "waiting for another make that installs into $(VENV)"
	@flock --close Makefile $(MAKE) --no-print-directory installed

installed: $(VENV)/.built
	@:

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or \
	  sys.exit("python %d.%d found, 3.11 to 3.13 needed; name one: make PYTHON=python3.12" % v)'
	@echo "installing torch and what else is needed into $(VENV)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

# If only csrc/ changed, the C++ module is compiled in place; otherwise the package is reinstalled (editable).
EDITABLE = $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
IN_PLACE = $(BIN)/python setup.py --quiet build_ext --inplace
$(VENV)/.built: $(VENV)/.installed pyproject.toml setup.py build_backend.py $(SOURCES)
	@echo "compiling the C++ module (the whole of it takes some minutes on two cores)"
	$(if $(filter-out csrc/%,$?),$(EDITABLE),$(IN_PLACE))
	@$(BIN)/python -c 'from coconut_fast import ops; print("built:", ops.extension().build_info())'
	touch $@

demo: install
	$(BIN)/coconut-fast demo

# One thread per process: the processes share the cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -n auto --maxprocesses 4 -m "not slow and not gpu"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python -m pytest -q -rs benchmarks

# The C++ module with address and undefined-behaviour sanitizers, in a copy of the package and its tests under build/:
# in the checkout, tests would import the checkout's own module. The sanitizers' runtimes must be loaded before python;
# leaks are not reported, since torch has its own.
SANITIZED := build/sanitize/lib
sanitize: install
	CFLAGS="-g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer" \
	LDFLAGS="-fsanitize=address,undefined" \
	  $(BIN)/python setup.py --quiet build --build-base build/sanitize --build-lib $(SANITIZED)
	cp -r tests pyproject.toml $(SANITIZED)/
	cd $(SANITIZED) && export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	  LD_PRELOAD="$$(for lib in asan ubsan stdc++; do $${CXX:-g++} -print-file-name=lib$$lib.so; done | xargs)" && \
	"$(CURDIR)/$(BIN)/python" -c 'import torch, coconut_fast._C as m; assert "$(SANITIZED)" in m.__file__, m.__file__' && \
	"$(CURDIR)/$(BIN)/python" -m pytest -q -rs --capture=sys -p no:cacheprovider $(SANITIZED_TESTS)

clean:
	rm -rf build dist *.egg-info coconut_fast/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -f $(VENV)/.built
