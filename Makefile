# Two commands do everything on a fresh machine: `make demo` and `make test`. Each makes its own .venv first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint race fuzz upstream matrix bench gpu package wheel sanitize clean

demo: $(INSTALLED)
	$(BIN)/python train/digits.py --name digits/ssn --norm ssn --scale 2 --resume
	$(BIN)/python train/digits.py --name digits/bssn --norm bssn --scale 2 --resume
	$(BIN)/python train/compare.py runs/digits/ssn runs/digits/bssn --out runs/digits/compare.png
	@echo "One seed is no ranking. Five seeds of each, at nine scales: README.md, \"What it shows in miniature\","
	@echo "and train/results/digits/scales.csv. Both are at their best, within the standard errors, at the scale 2 of this demo."

# Workers share the cores: threads that wait for others must not spin meanwhile.
test: $(INSTALLED)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -p no:benchmark -n auto --maxprocesses 4 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The Triton kernels in their interpreter, programs in any order: bounds of every access, races. Some minutes.
race: $(INSTALLED)
	$(BIN)/python -W ignore tests/races.py

# Single weights of any shape, layout, dtype and size against an oracle that shares nothing with fastsn.
CASES ?= 10000
SEED ?= 1
fuzz: $(INSTALLED)
	OMP_WAIT_POLICY=passive $(BIN)/python tests/fuzz.py --cases $(CASES) --seed $(SEED)

# PyTorch's own tests of its spectral norms, from a checkout: TESTS="pytorch/test/nn/test_parametrization.py ...".
TESTS ?=
upstream: $(INSTALLED)
	$(BIN)/python tests/upstream.py $(TESTS)

bench: $(INSTALLED)
	$(BIN)/python -m pytest bench/ --benchmark-only

# On a machine with a GPU, torch and triton, in that python: nothing is installed. Results go to $(OUT). Three parts of
# nine minutes at most: PART=1 tests, memory errors and training steps, PART=2 times of the kernels and of training,
# PART=3 profiles, all launch settings and the tests on its CPU.
OUT ?= gpu-results
PART ?= 1 2 3
FASTSN_COMMIT ?= $(shell git describe --always --dirty --abbrev=12 2>/dev/null)
gpu:
	FASTSN_COMMIT="$(FASTSN_COMMIT)" $(PYTHON) .ci/gpu.py $(PART) --out "$(OUT)" $(if $(REHEARSE),--rehearse)

# An sdist and a pure wheel in dist/; the sdist is installed in the ways that users do.
package: $(INSTALLED)
	$(BIN)/python .ci/check_package.py

# One wheel in dist/ with the kernels for each of these, used under each. Takes some GB per version where the index has
# only CUDA builds; nothing of CUDA goes into the wheel.
TORCH_VERSIONS ?= 2.10.0 2.11.0 2.12.1 2.13.0 2.14.1
wheel:
	$(PYTHON) .ci/build_wheel.py $(TORCH_VERSIONS)

# The op tests with AddressSanitizer and UndefinedBehaviorSanitizer in the C++ kernels; SANITIZED chooses tests.
SANITIZED ?=
sanitize: $(INSTALLED)
	rm -rf build/sanitized && mkdir -p build/sanitized && cp -r fastsn csrc setup.py pyproject.toml README.md LICENSE build/sanitized
	cd build/sanitized && rm -f fastsn/_C_* && FASTSN_SANITIZE=address,undefined ../../$(BIN)/python setup.py --quiet build_ext --inplace
	cd build/sanitized && PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) $$(gcc -print-file-name=libstdc++.so)" \
		../../$(BIN)/python -m pytest -c ../../pyproject.toml -p no:cacheprovider --timeout 1200 $(SANITIZED) \
		../../tests/test_ops.py ../../tests/test_op_errors.py ../../tests/test_storage.py \
		../../tests/test_vector_tails.py

# The tests on other versions of Python and torch; MATRIX chooses some, as 3.10-2.10.0. Some GB and 10 minutes each.
MATRIX ?=
matrix:
	$(PYTHON) .ci/matrix.py $(MATRIX)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache fastsn/_C_*

$(INSTALLED): .ci/requirements.txt pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r .ci/requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@
