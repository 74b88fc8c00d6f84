# Two commands: `make quickstart` runs the main job, `make test` checks everything fast.
# Both make .venv and install what they need; Python 3.11 or newer is all they ask for.
PYTHON ?= python3
BIN := .venv/bin
SLOW ?= slow
export PIP_DISABLE_PIP_VERSION_CHECK := 1

quickstart: .venv/run
	$(BIN)/residua quickstart

test: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -n auto

slow: .venv/dev
	$(BIN)/python -m pytest -n auto -m "$(SLOW)"

# The site: the pages and the docstrings, every warning an error.
site: .venv/dev
	$(BIN)/python -m sphinx -q -W --keep-going -c docs -d build/doctrees . site

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Where the venv module lacks ensurepip, the pip that is there installs one into the venv.
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv || ($(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install pip)

.venv/run: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[all]'
	touch $@

.venv/dev: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@ .venv/run

.PHONY: quickstart test slow site format
