# Everything that a user runs: each target does its own set-up in .venv.
PYTHON ?= python3
CONSTRAINTS := constraints.txt
SOURCES := setup.py pyproject.toml $(CONSTRAINTS) $(shell find csrc -type f) attnkern/_schemas.py
PY := .venv/bin/python
# Without a GPU to ask, one architecture keeps the build short; a wheel for others names its own.
export TORCH_CUDA_ARCH_LIST ?= $(if $(shell command -v nvidia-smi),,9.0)
ifeq ($(strip $(TORCH_CUDA_ARCH_LIST)),)
unexport TORCH_CUDA_ARCH_LIST
endif

.PHONY: setup bench bench-publish accuracy count test docs reproduce gallery fuzz mutate soak sanitize compat gpu wheel sdist sbom release release-check clean

setup: .venv/ready

PIP := $(PY) -m pip --quiet --disable-pip-version-check

# First what building needs, then what pyproject.toml lists; the kernels are built below.
.venv/packages: pyproject.toml $(CONSTRAINTS)
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PIP) install --constraint $(CONSTRAINTS) torch setuptools ninja
	ATTNKERN_NO_NATIVE=1 $(PIP) install --constraint $(CONSTRAINTS) --no-build-isolation --editable '.[dev,triton]'
	touch $@

.venv/ready: .venv/packages $(SOURCES)
	$(PIP) install --no-build-isolation --no-deps --editable .
	$(PY) -m attnkern info
	touch $@

# attnkern beside eager PyTorch and torch.compile on this machine, about five minutes: build/bench.
bench: setup
	$(PY) -m benchmarks.run

# Adds a run to the published ones and to docs/performance.md: the newest, or RUN=FILE.json.
bench-publish: setup
	$(PY) -m benchmarks.report --publish $(or $(RUN),newest)

# Errors in ulp beside eager's and torch.compile's, a quarter of an hour: docs/accuracy.md.
accuracy: setup
	$(PY) -m benchmarks.accuracy

# What the GPU kernels execute, counted from their machine code without a GPU, beside torch.compile's: docs/gpu.md.
count: setup
	$(PY) -m benchmarks.count

test: setup
	$(PY) tests/run.py

# The documentation site, in build/site.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# Every family and its baselines on digits-clutter, a few minutes each: docs/reproduction.md.
reproduce: setup
	$(PY) -m attnkern.training.reproduce

# Pictures of those runs: docs/gallery.md.
gallery: setup
	$(PY) docs/make_gallery.py

# Random calls against float64; ATTNKERN_FUZZ_SEED repeats a run.
EXAMPLES ?= 200000
fuzz: setup
	$(PY) tests/fuzz.py --examples $(EXAMPLES)

# Faults planted in the kernels, one at a time; the tests must catch them: docs/mutation.md. Hours; SEED= goes on with a draw.
mutate: setup
	$(PY) tests/mutate.py $(if $(SEED),--seed $(SEED))

# 40,000 calls of random shapes, some minutes: memory, repeatability, caches.
soak: setup
	$(PY) tests/soak.py

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, about two minutes; part of the tests.
sanitize: setup
	bash tests/sanitize.sh

# The source built under the lowest version of PyTorch, then one wheel under several; not part of the tests.
VERSIONS ?= 2.11.0:python3.12 2.13.0:python3.11 2.15.0:python3.13
compat: setup
	bash tests/compat.sh $(VERSIONS)

# For a machine with a GPU and no network: builds in place with the Python at hand and installs nothing. Repeat it until
# it is finished: docs/gpu-run.md. GPU= passes options to tests/gpu.py.
gpu:
	$(PYTHON) tests/gpu.py $(GPU)

wheel: setup
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .

# What a release consists of, made of the last commit, in dist: release/README.md.
sdist sbom release release-check: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct)

sdist: setup
	rm -rf build/source && mkdir -p build/source
	git archive HEAD | tar -x -C build/source
	cd build/source && FORCE_CUDA=0 $(CURDIR)/$(PY) setup.py --quiet sdist --dist-dir $(CURDIR)/dist

sbom: setup
	$(PY) release/sbom.py dist

release: setup
	rm -rf dist
	$(MAKE) sdist sbom
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist dist/attnkern-*.tar.gz
	cd dist && sha256sum attnkern-* >SHA256SUMS

# The source archive in an empty folder: builds there, without CUDA, and runs the tests of its kernels.
release-check: sdist
	bash release/check.sh dist/attnkern-*.tar.gz

clean:
	rm -rf build dist .venv attnkern/*.so *.egg-info
