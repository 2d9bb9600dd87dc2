# Each target creates .venv and installs what it needs there.
PYTHON ?= python3
CONSTRAINTS := constraints.txt
SOURCES := setup.py $(shell find csrc -type f) attnkern/_schemas.py
PY := .venv/bin/python
SHELL := bash
.SHELLFLAGS := -o pipefail -c

.PHONY: setup bench bench-publish accuracy count test test-all docs reproduce gallery fuzz mutate soak sanitize compat gpu wheel \
	sdist sbom release release-check clean

# Packages for the benchmarks and the command line, and the compiled kernels: the CUDA kernels only where a GPU is
# visible, or with FORCE_CUDA=1.
setup: .venv/ready

PIP := $(PY) -m pip --disable-pip-version-check
# Python compiles modules when they are first imported, which is much less than all that pip would compile.
INSTALL := $(PIP) install --progress-bar off --no-compile --constraint $(CONSTRAINTS)
# One line for each package that is downloaded, instead of three.
SHORT := | sed -u -n 's/^ *\(\(Downloading\|Using cached\) .*\)/    \1/p; s/^\(Installing collected packages\): .*/    \1/p'
# The package itself is installed without kernels; they are compiled afterwards.
EDITABLE := FORCE_CUDA=0 ATTNKERN_NO_NATIVE=1 $(INSTALL) --no-build-isolation --editable

.venv/packages: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit( \
	"attnkern needs Python 3.11 or later, and $(PYTHON) is Python " + v + ": name another one, make PYTHON=python3.12")'
	@test "$(ATTNKERN_NO_NATIVE)" = 1 || echo '#include <concepts>' | $${CXX:-c++} -std=c++20 -x c++ -fsyntax-only - 2>/dev/null || { \
	echo "attnkern needs a C++20 compiler, GCC 12 or Clang 16 or later: install one or name it, make CXX=g++-12"; exit 1; }
	@echo "==> Python packages into .venv: PyTorch and its CUDA libraries are about 3 GB; 1 to 3 minutes"
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(INSTALL) torch setuptools ninja $(SHORT)
	@$(EDITABLE) '.[bench,triton]' $(SHORT)
	@touch $@

.venv/ready: .venv/packages $(SOURCES)
	@echo "==> Compiled kernels"
	@$(PY) setup.py --quiet build_ext --inplace
	@$(PY) -m attnkern info
	@touch $@

ifdef FORCE_CUDA # asks for other libraries than those that may be there: setup.py keeps what is up to date
.PHONY: .venv/ready
endif

# What only the tests import.
.venv/dev: .venv/packages
	@echo "==> Packages for the tests: about 200 MB, half a minute"
	@$(EDITABLE) '.[dev]' $(SHORT)
	@touch $@

.venv/docs: .venv/packages
	@echo "==> Packages for the documentation: about 20 MB"
	@$(EDITABLE) '.[docs]' $(SHORT)
	@touch $@

# The CUDA kernels also where no GPU is visible: then one architecture keeps the build short.
ARCHITECTURE := $(if $(shell command -v nvidia-smi),,TORCH_CUDA_ARCH_LIST="$(or $(TORCH_CUDA_ARCH_LIST),9.0)")
.venv/cuda: .venv/ready
	@echo "==> CUDA kernels; FORCE_CUDA=0 leaves them out"
	@FORCE_CUDA=$(or $(FORCE_CUDA),1) $(ARCHITECTURE) $(PY) setup.py --quiet build_ext --inplace
	@touch $@

# The tests that find errors fastest, in about five minutes on two cores.
test: setup .venv/dev
	@$(PY) tests/run.py --quick

# Every test, sanitizers and planted errors included: about half an hour on two cores.
test-all: setup .venv/dev .venv/docs .venv/cuda
	@env -u FORCE_CUDA -u TORCH_CUDA_ARCH_LIST ATTNKERN_TEST_CUDA_LIBRARY=$(or $(FORCE_CUDA),1) $(PY) tests/run.py

# Compares attnkern with eager PyTorch and torch.compile on this machine, in about ten minutes: build/bench.
bench: setup
	$(PY) -m benchmarks.run

# Adds a run to the published ones and to docs/performance.md: the newest, or RUN=FILE.json.
bench-publish: setup
	$(PY) -m benchmarks.report --publish $(or $(RUN),newest)

# Errors in units in the last place, compared with eager PyTorch and torch.compile, in 15 minutes: docs/accuracy.md.
accuracy: setup
	$(PY) -m benchmarks.accuracy

# Counts the instructions of the GPU kernels and of torch.compile's from their machine code, without a GPU: docs/gpu.md.
count: setup .venv/cuda
	$(PY) -m benchmarks.count

# The documentation site, in build/site.
docs: setup .venv/docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# Trains small networks with every kind of attention on digits, five seeds each: docs/reproduction.md. With FULL=1 also
# the parts that take longer and the papers' architectures. A call that was interrupted continues where it was.
reproduce: setup
	$(PY) -m attnkern.training.reproduce $(if $(FULL),--full)

# Pictures of those runs: docs/gallery.md.
gallery: setup
	$(PY) docs/make_gallery.py

# Compares random calls with float64; ATTNKERN_FUZZ_SEED repeats a run.
EXAMPLES ?= 200000
fuzz: setup .venv/dev
	$(PY) tests/fuzz.py --examples $(EXAMPLES)

# Plants faults in the kernels, one at a time, which the tests must catch: docs/mutation.md. Takes hours; SEED= continues.
mutate: setup .venv/dev
	$(PY) tests/mutate.py $(if $(SEED),--seed $(SEED))

# Checks memory, repeatability and caches over 40,000 calls of random shapes, in a few minutes.
soak: setup .venv/dev
	$(PY) tests/soak.py

# Tests the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in two minutes; part of test-all.
sanitize: setup .venv/dev
	bash tests/sanitize.sh

# Tests the source under the lowest version of PyTorch, then one wheel under several versions; not part of test-all.
VERSIONS ?= 2.11.0:python3.12 2.13.0:python3.11 2.15.0:python3.13
compat: setup
	bash tests/compat.sh $(VERSIONS)

# For a machine with a GPU and no network: builds in place with $(PYTHON) and installs nothing. Repeat the command until
# it says that it is finished: docs/gpu-run.md. GPU= passes options to tests/gpu.py.
gpu:
	$(PYTHON) tests/gpu.py $(GPU)

# With CUDA kernels where there is a toolkit.
wheel release: export FORCE_CUDA ?= $(if $(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null),1,0)

wheel: setup
	$(PIP) --quiet wheel --no-build-isolation --no-deps --wheel-dir dist .

# The files of a release, made from the last commit, in dist: release/README.md.
sdist sbom release release-check: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct)

sdist: setup
	rm -rf build/source && mkdir -p build/source
	git archive HEAD | tar -x -C build/source
	cd build/source && FORCE_CUDA=0 $(CURDIR)/$(PY) setup.py --quiet sdist --dist-dir $(CURDIR)/dist

sbom: setup .venv/dev
	$(PY) release/sbom.py dist

release: setup
	rm -rf dist
	$(MAKE) sdist sbom
	$(PIP) --quiet wheel --no-build-isolation --no-deps --wheel-dir dist dist/attnkern-*.tar.gz
	cd dist && sha256sum attnkern-* >SHA256SUMS

# Unpacks the source archive in an empty folder, builds it without CUDA, and runs the tests of the CPU kernels.
release-check: sdist .venv/dev
	bash release/check.sh dist/attnkern-*.tar.gz

clean:
	rm -rf build dist .venv attnkern/*.so *.egg-info
