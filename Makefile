# Everything happens in .venv; an extra is installed once, and again when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
OLDEST_PYTHON ?= $(PYTHON)
installed = $(VENV)/.installed-$(1)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-oldest check docs links figures dist benchmarks clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(call installed,examples)  ## prune a small network on handwritten digits
	$(BIN)/python examples/digits.py

test: $(call installed,test)  ## run every test and every doctest
	$(BIN)/python -m pytest -n auto

test-all: $(call installed,test)  ## run the full matrices too, and test-oldest; takes long
	$(BIN)/python -m pytest --full
	$(MAKE) test-oldest

test-oldest: $(OLDEST)/.installed  ## run every test on the lowest versions that pyproject.toml promises
	$(OLDEST)/bin/python -m pytest -n auto

check: $(call installed,dev)  ## format, lint, types, import rules and the fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow" -n auto

docs: $(call installed,docs)  ## build the documentation into docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

links: $(call installed,docs)  ## ask every link of the documentation whether it is there; needs the network
	$(BIN)/python -m sphinx -W --keep-going -b linkcheck docs docs/_build/links

figures: $(call installed,examples)  ## draw every figure of README and docs again, and the notebook; takes minutes
	for name in tolerance phases pqi_curve learning_rate; do $(BIN)/python docs/figures/$$name.py || exit 1; done
	$(BIN)/python docs/notebook.py

dist: $(call installed,dev)  ## build what a release uploads into dist/, and check it as an index does
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

benchmarks: $(call installed,examples)  ## measure everything that the docs quote; IMAGES=folder adds colour images; takes hours
	for name in digits_accuracy one_pruning training_step monitoring growth checkpoints memory deploy small_file; do \
		$(BIN)/python benchmarks/$$name.py || exit 1; done
	for name in adaptive_amounts algorithms tolerance units; do \
		$(BIN)/python benchmarks/$$name.py $(if $(IMAGES),--images $(IMAGES)) || exit 1; done
	$(BIN)/python benchmarks/summary.py

clean:  ## remove what was built, run and cached; .venv stays
	rm -rf build dist docs/_build lightning_logs checkpoints outputs .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'lightning-sap needs Python 3.10 or newer; $(PYTHON) is not. Try: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install 'pip>=23.1'
	@touch $@

$(VENV)/.installed-%: $(VENV)/.created pyproject.toml
	@echo 'Installing what "$*" needs; PyTorch is large, the first time takes a few minutes.'
	$(BIN)/python -m pip install -e '.[$*]'
	@touch $@

# uv resolves to the lowest versions, which pip cannot. They have wheels for Python 3.10 to 3.12 only.
$(OLDEST)/.installed: pyproject.toml
	@$(OLDEST_PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || \
		{ echo 'The lowest versions need Python 3.10 to 3.12; $(OLDEST_PYTHON) is not. Try: make OLDEST_PYTHON=python3.10 ...' >&2; exit 1; }
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install uv
	$(OLDEST)/bin/uv pip install --python $(OLDEST)/bin/python --resolution lowest-direct -e '.[test]'
	@touch $@
