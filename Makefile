# Every target makes its own virtual environment; nothing needs to be installed by hand but Python, make and a C++17 compiler.
#   make demo    train a small network on Fashion-MNIST with SGD and with SAM, and compare them
#   make test    all tests
#   make bench   the benchmarks
#   make lint    ruff, mypy
#   make sanitize  the kernel tests under AddressSanitizer and UBSan

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP_INSTALL = -m pip install --disable-pip-version-check -c constraints.txt
SOURCES = setup.py pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)

.PHONY: all test demo bench lint sanitize clean

all: test

# The environment is built again when the native sources or the requirements change; Python files are used from where they are.
$(VENV)/installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) --quiet torch
	SAM_FAST_WERROR=$${SAM_FAST_WERROR-1} $(BIN)/python $(PIP_INSTALL) -v -e '.[test,bench,demo]' > $(VENV)/install.log 2>&1 \
		|| { cat $(VENV)/install.log; exit 1; }
	@sed -n 's/^ *sam_fast: /built: /p' $(VENV)/install.log | sort -u
	touch $@

test: $(VENV)/installed
	$(BIN)/python -m pytest

demo: $(VENV)/installed
	$(BIN)/python -m sam_fast demo

bench: $(VENV)/installed
	$(BIN)/python -m pytest bench --benchmark-only

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A second environment whose native module is instrumented; Python itself is not, so the runtime library is preloaded.
$(VENV)-sanitize/installed: $(SOURCES) $(shell find sam_fast -name '*.py')
	$(PYTHON) -m venv $(VENV)-sanitize
	$(VENV)-sanitize/bin/python $(PIP_INSTALL) --quiet torch pytest numpy
	SAM_FAST_WERROR=1 SAM_FAST_SANITIZE=address,undefined $(VENV)-sanitize/bin/python $(PIP_INSTALL) --quiet .
	touch $@

sanitize: $(VENV)-sanitize/installed
	cd tests && LD_PRELOAD="$$($(or $(CXX),g++) -print-file-name=libasan.so) $$($(or $(CXX),g++) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 SAM_FAST_EXPECT_SANITIZER=address,undefined \
		../$(VENV)-sanitize/bin/python -m pytest -q -p no:cacheprovider --capture=sys kernels

clean:
	rm -rf $(VENV) $(VENV)-sanitize build dist *.egg-info sam_fast/*.so sam_fast/_build_info.json
