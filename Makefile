# `make demo` and `make test` do everything from a fresh clone: they set up .venv and install what they need.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
UV     := $(shell command -v uv 2>/dev/null)

# A stamp per set of extras, newer than pyproject.toml when what is installed is up to date.
ifdef UV
INSTALL = $(UV) pip install --quiet --python $(BIN)/python
else
INSTALL = $(BIN)/python -m pip install --quiet
endif

.PHONY: demo test lint bench clean

demo: $(VENV)/.installed
	$(BIN)/minemap demo --out demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks

# A folder that is only half made must not be taken for one
$(BIN)/python:
ifdef UV
	$(UV) venv --quiet --seed --python $(PYTHON) $(VENV)
else
	$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }
endif

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(INSTALL) -e ".[test]"
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache
