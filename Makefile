# Everything a fresh machine needs: `make demo` and `make test`. `make help` lists the verbs.
#
#   TORCH       what pip installs first, alone, so that nothing later replaces it
#   TORCH_ARGS  extra pip arguments for that step. A machine without a GPU saves gigabytes with
#               make demo TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
#   WORKERS     test processes side by side, each with its share of the cores
#   TINY        where `make tiny` keeps its data, its run and the model; it resumes from there
#   TINY_RECIPE what it trains
#   LOWEST_TORCH  the same for `make test-lowest`; PyPI's is the CUDA build, 3 GB

TORCH ?= torch==2.13.0
TORCH_ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= 2
TINY ?= runs/tiny
TINY_RECIPE ?= recipes/tiny.toml
LOWEST_TORCH ?= torch==2.11.0

VENV := .venv
BIN := $(VENV)/bin
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations 25
STAMP := $(VENV)/.installed
LOWEST := .venv-lowest
PIP := $(BIN)/python -m pip --disable-pip-version-check install --only-binary :all: -c constraints.txt
CHECKED := pixart_rt examples
NO_BENCH := __init__ checks host_time profile_kernels provenance rows standin_driver tune weights \
  xl_folder
BENCHES := $(filter-out $(NO_BENCH), $(basename $(notdir $(wildcard benchmarks/*.py))))
ENOUGH := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))

REHEARSAL_VENV ?= .venv-gpu

.PHONY: help demo tiny test test-fast test-all test-lowest test-gpu gpu-rehearsal check bench dist clean
.DELETE_ON_ERROR:

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

demo: $(STAMP) ## build the tiny 1024 bundle and draw a contact sheet
	@echo "Builds 1024 px engines of the model that comes with the package, and draws six images" \
	  "with them: a few minutes on two CPU cores."
	$(BIN)/pixart-rt build --model tiny --res 1024 --out engines/tiny-1024
	$(BIN)/python examples/contact_sheet.py --bundle engines/tiny-1024 --output demo/contact-sheet.png
	@echo "The images are in $(CURDIR)/demo/contact-sheet.png"
	@echo "For your own: . $(BIN)/activate, then pixart-rt generate PROMPT --bundle engines/tiny-1024 -o out.png"

tiny: $(STAMP) ## draw scenes, train the tiny model on them and score it; takes hours, resumes
	$(BIN)/python -m examples.tiny.data --recipe $(TINY_RECIPE) --out $(TINY)/data
	$(BIN)/pixart-rt train $(TINY_RECIPE) --out $(TINY)/run --save-every 100 \
	  --data 'classes=$(TINY)/data/features/classes-{res}' \
	  --data 'squares=$(TINY)/data/features/squares-{res}' \
	  --data 'scenes=$(TINY)/data/features/scenes-{res}'
	$(BIN)/python -m examples.tiny.loss_curve $(TINY)/run --out $(TINY)/loss.png
	$(BIN)/python -m examples.tiny.export --run $(TINY)/run --out $(TINY)/model --force
	$(BIN)/python -m benchmarks.score_tiny --assets $(TINY)/model --resolution 256 --captions 200 \
	  --guidance 3 --sheet $(TINY)/sheet-256.png
	$(BIN)/python -m benchmarks.score_tiny --assets $(TINY)/model --resolution 1024 --captions 50 \
	  --guidance 3 --batch 1 --sheet $(TINY)/sheet-1024.png

test: $(STAMP) ## all tests that need no GPU
	$(PYTEST) -m "not gpu and not exhaustive" $(PYTEST_ARGS)

test-fast: $(STAMP) ## the tests that take seconds
	$(PYTEST) -m "not gpu and not slow and not exhaustive" $(PYTEST_ARGS)

test-all: $(STAMP) ## what `make test` only samples, exhaustively
	$(PYTEST) -m "exhaustive and not gpu" $(PYTEST_ARGS)

test-lowest: $(LOWEST)/.installed ## kernels, model and benches with the lowest versions (3 GB)
	$(LOWEST)/bin/python -m pytest -m "not gpu and not exhaustive" $(PYTEST_ARGS) \
	  tests/kernels tests/model tests/benchmarks

test-gpu: $(STAMP) ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

check: $(STAMP) ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(CHECKED)
	$(BIN)/mypy --explicit-package-bases benchmarks

bench: $(STAMP) ## run every benchmark; results go to benchmarks/results
	set -e; for bench in $(BENCHES); do echo "$$bench"; $(BIN)/python -m "benchmarks.$$bench"; done

gpu-rehearsal: $(REHEARSAL_VENV)/.ready ## benchmarks/gpu without a GPU; downloads 3 GB
	PYTHON=$(REHEARSAL_VENV)/bin/python benchmarks/gpu/rehearse.sh

$(REHEARSAL_VENV)/.ready: benchmarks/gpu/machine.txt
	python3.12 -m venv $(REHEARSAL_VENV)
	$(REHEARSAL_VENV)/bin/python -m pip --disable-pip-version-check install --only-binary :all: -r $<
	@touch $@

dist: $(STAMP) ## a wheel in dist/
	$(BIN)/python -m pip --disable-pip-version-check wheel --no-deps --wheel-dir dist .

clean: ## remove what the verbs made, but the virtual environment
	rm -rf build dist demo engines/tiny-1024 *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(STAMP): constraints.txt pyproject.toml setup.py
	@python=; for each in python3.11 python3.12 python3.13 python3; do \
	  if $$each -c '$(ENOUGH)' 2>/dev/null; then python=$$each; break; fi; done; \
	if [ -z "$$python" ]; then echo "error: no Python >= 3.11 with its venv module was found;" \
	  "install one (Debian, Ubuntu: python3 and python3-venv)" >&2; exit 2; fi; \
	[ -x $(BIN)/python ] || "$$python" -m venv $(VENV)
	$(PIP) $(TORCH_ARGS) "$(TORCH)"
	$(PIP) -e ".[dev]"
	@touch $@

# The card's Python first: 3.12. Wheels of these versions exist for 3.11 too.
$(LOWEST)/.installed: constraints-lowest.txt pyproject.toml setup.py
	@python=; for each in python3.12 python3.11; do \
	  if $$each -c '$(ENOUGH)' 2>/dev/null; then python=$$each; break; fi; done; \
	if [ -z "$$python" ]; then echo "error: no Python 3.12 or 3.11 with its venv module was" \
	  "found; the lowest versions have wheels for these" >&2; exit 2; fi; \
	[ -x $(LOWEST)/bin/python ] || "$$python" -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip --disable-pip-version-check install --only-binary :all: \
	  -c constraints-lowest.txt $(TORCH_ARGS) "$(LOWEST_TORCH)"
	$(LOWEST)/bin/python -m pip --disable-pip-version-check install --only-binary :all: \
	  -c constraints-lowest.txt -e ".[train,data,tensorboard,quant]" pytest
	@touch $@
