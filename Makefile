# make run: the main job, from nothing. make test: what CI runs.
PYTHON ?= python3
# what an argument of $(call) cannot hold
comma := ,
BIN = .venv/bin
SOURCES = pyproject.toml assets/pyproject.toml constraints.txt

# Installs the extra $(1): both packages from this tree, so that no index is asked for the second.
# Python compiles what came on all cores, where pip would take one; what no Python can read is left,
# and so are large folders of which little is imported.
define INSTALL
$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable ./assets --editable '.[$(1)]'
$(BIN)/python -W ignore -m compileall -qq -j 0 -x '/(tests?|testing|models|rllib|chardet|pip|mypy|OpenGL|nltk)/' .venv/lib || true
endef

.PHONY: run test docs bench results gpu clean-install clean

run: .venv/.run
	$(BIN)/evatune init --out runs/demo --overwrite

# mypy takes one core, and fills what pytest leaves of the others.
test: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy & types=$$!; $(BIN)/pytest -n 3 --dist worksteal && wait $$types

# The documentation, into site/; a link that leads nowhere is an error (with --quiet, it would not be).
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: .venv/.run
	$(BIN)/python benchmarks/init.py --output benchmarks/results/init.json

# docs/results, from the committed lines of the comparison.
results: .venv/.run
	$(BIN)/python benchmarks/results_pages.py

# On a machine with a GPU: the figures there, and the tests that `make test` skips.
gpu: .venv/.test
	$(BIN)/python benchmarks/gpu.py --output benchmarks/results/gpu.json
	$(BIN)/pytest -m gpu

# The wheel in empty environments, with the lowest versions and the newest: gigabytes, and half an hour.
clean-install:
	$(PYTHON) scripts/clean_install.py

.venv/.run: $(SOURCES)
	$(PYTHON) -m venv .venv
	$(call INSTALL,demo)
	touch $@

.venv/.test: $(SOURCES)
	$(PYTHON) -m venv .venv
	$(call INSTALL,dev$(comma)docs)
	touch .venv/.run .venv/.docs $@

.venv/.docs: .venv/.run
	$(call INSTALL,docs)
	touch $@

clean:
	rm -rf .venv runs dist site .mypy_cache .ruff_cache .pytest_cache
