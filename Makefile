# Everything runs in .venv, which `make setup` makes; the other targets make it where it is not there yet.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Some of CI's machines have two cores: more threads than cores only disturb each other.
export TOKENIZERS_PARALLELISM = false
export HF_HUB_OFFLINE = 1

.PHONY: setup check-install demo test test-page test-golden test-triton test-gpu bench bench-gpu lint typecheck format clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

# Whether what setup installs resolves on a user's machine: against the package index alone, with CUDA and CPU builds of
# torch, on every supported Python that is here. INSTALL has options, as "--python 3.11 --build cuda".
check-install:
	$(PYTHON) tests/install/check_install.py $(INSTALL)

demo: setup
	$(BIN)/lowvram demo --out-dir demo-out

test: setup
	$(BIN)/python -m pytest -m "not gpu" --numprocesses 2 --dist loadfile --no-loadscope-reorder tests

# The page of `lowvram serve` in a headless Chromium, on the demo's model; PAGE has options, as "--picture page.png".
test-page: setup
	test -d demo-out/artifact-int8 || $(BIN)/lowvram demo --out-dir demo-out
	$(BIN)/python tests/browser/check_page.py $(PAGE)

test-golden: setup
	$(BIN)/python -m pytest -m golden tests

# The kernels under every version of Triton that the supported versions of PyTorch bring, and the newest.
test-triton: setup
	$(BIN)/python tests/kernels/versions.py

test-gpu: setup
	$(BIN)/python -m pytest -m gpu tests

# benchmarks/outliers.py is not among them: it wants networks and peers of the extra `bench`, which setup leaves out.
bench: setup
	$(BIN)/python benchmarks/convert.py --out benchmarks/results/convert_cpu.json
	$(BIN)/python benchmarks/convert_sources.py --out benchmarks/results/convert_sources_cpu.json
	$(BIN)/python benchmarks/fidelity.py --out benchmarks/results/fidelity_cpu.json
	$(BIN)/python benchmarks/quality.py --out benchmarks/results/quality_cpu.json
	$(BIN)/python benchmarks/rings.py --out benchmarks/results/rings_cpu.json
	$(BIN)/python benchmarks/vae_int8.py --out benchmarks/results/vae_int8_cpu.json
	$(BIN)/python benchmarks/vae_overlap.py --out benchmarks/results/vae_overlap.json
	$(BIN)/python benchmarks/sensitivity.py --only units --out benchmarks/results/sensitivity_cpu.json
	$(BIN)/python benchmarks/sensitivity.py --only budgets --out benchmarks/results/sensitivity_budgets_cpu.json
	$(BIN)/python benchmarks/memory.py --out benchmarks/results/memory_cpu.json
	$(BIN)/python benchmarks/long_voice.py --out benchmarks/results/long_voice_cpu.json
	$(BIN)/python benchmarks/plans.py --out benchmarks/results/plans.json
	$(BIN)/python benchmarks/faults.py --out benchmarks/results/faults_cpu.json
	$(BIN)/python benchmarks/collisions.py --out benchmarks/results/collisions_cpu.json
	$(BIN)/python benchmarks/cpu_linear.py --out benchmarks/results/cpu_linear.json
	$(BIN)/python benchmarks/parallel.py --out benchmarks/results/parallel_cpu.json
	$(BIN)/python benchmarks/host_time.py --out benchmarks/results/host_time.json
	$(BIN)/python benchmarks/resident.py --out benchmarks/results/resident_cpu.json

# On a machine with a CUDA device; says so and fails elsewhere. FULL_SIZE has options, as "--dir /data --resume".
bench-gpu: setup
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/full_size.py $(FULL_SIZE)
	$(BIN)/python benchmarks/parallel.py --out benchmarks/results/parallel_gpu.json

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: setup
	$(BIN)/mypy
	$(BIN)/python tests/types/borders.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf demo-out build *.egg-info .pytest_cache .mypy_cache .ruff_cache
