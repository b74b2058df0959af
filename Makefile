# `make quickstart` and `make test` are all a newcomer needs; each installs what is missing into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Compiled as they are installed: Ray starts a dozen processes for a job, and each would compile what it imports.
UV := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt
# For one file; the default of a minute is too short for a machine at full load.
export UV_COMPILE_BYTECODE_TIMEOUT := 600

.PHONY: lock sbom quickstart test test-all gpu-check check format docs bench benchmarks install build clean

quickstart: install
	$(BIN)/refinedet launch jobs/quickstart.yaml

test: install
	$(BIN)/python -m pytest tests

test-all: install
	$(BIN)/python -m pytest tests -m "not gpu or gpu" --timeout 1800

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	git ls-files '*.py' '*.md' '*.yaml' '*.yml' '*.toml' '*.j2' '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/codespell
	$(BIN)/python -m tests.docs.language
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' | xargs -r $(BIN)/clang-format --dry-run --Werror

# The documentation as pages that open without a server: build/site/index.html
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' | xargs -r $(BIN)/clang-format -i

# Everything that only a GPU can show, in under 10 minutes: needs torch and the built operators, neither Ray nor network.
# With another environment: make gpu-check GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python
gpu-check:
	$(GPU_PYTHON) -m tests.gpu.check

bench: install
	for bench in tests/bench/bench_*.py; do $(BIN)/python -m tests.bench.$$(basename $$bench .py) || exit 1; done

# The tables of BENCHMARKS.md and the plots of the README, from tests/bench/results/*.json
benchmarks: install
	$(BIN)/python -m tests.bench.tables

# What is installed, with versions and licenses, as a CycloneDX bill of materials: build/sbom.json
sbom: install
	mkdir -p build
	$(BIN)/uv tool run --from cyclonedx-bom==7.5.0 cyclonedx-py environment --pyproject pyproject.toml \
	    --output-reproducible --output-file build/sbom.json $(BIN)/python

# Versions and hashes of what infra/Dockerfile installs; again after a change of constraints.txt or pyproject.toml.
lock: install
	printf '%s\n' boto3 google-api-python-client setuptools wheel scikit-build-core cmake ninja psutil \
	    | $(BIN)/uv pip compile --quiet pyproject.toml - --extra pipeline --extra s3 --extra gcs \
	    --constraint constraints.txt --generate-hashes --no-emit-index-url --no-header --no-annotate \
	    --python-version 3.11 --python-platform x86_64-unknown-linux-gnu --output-file infra/lock.txt

install: $(VENV)/.installed

# The stamp stands for the packages, and for the operators built from csrc/.
$(VENV)/.installed: pyproject.toml constraints.txt $(wildcard csrc/* csrc/*/*)
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is missing; install Python 3.11 or newer."; exit 2; }
	@command -v g++ >/dev/null || echo "make: g++ is missing, so the operators run as their slower PyTorch references."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(UV) torch torchvision setuptools wheel scikit-build-core cmake ninja pyyaml psutil
	$(UV) --no-build-isolation --editable '.[pipeline,serve,dev,s3,export]'
	$(UV) --no-deps lvis tidecv appdirs seaborn  # references of the tests: they ask for a second OpenCV, over ours
	mkdir -p build/typing/refinedet  # for pyright, which does not read the installed mapping
	ln -sfn ../../../model build/typing/refinedet/model
	ln -sfn ../../../pipeline build/typing/refinedet/pipeline
	touch $@

# Rebuild the operators after a change in csrc/.
build:
	$(UV) --no-build-isolation --no-deps --editable .

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache
