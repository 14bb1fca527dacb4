# Two commands do everything on a fresh machine: `make demo` and `make test`. Each makes its own .venv first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint bench clean

demo: $(INSTALLED)
	$(BIN)/python train/digits.py --name digits/sn --variant sn --resume
	$(BIN)/python train/digits.py --name digits/bssn --variant bssn --scale 1.4 --resume
	$(BIN)/python train/compare.py runs/digits/sn runs/digits/bssn --out runs/digits/compare.png

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m pytest bench/ --benchmark-only

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(INSTALLED): .ci/requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r .ci/requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@
