# Everything runs in .venv, which the first target that needs it makes from $(PYTHON).
#   make demo                  pretrain on a few pictures, evaluate, draw      (DATA=folder: on your own pictures)
#   make test                  the tests                                       (PYTEST_ARGS="tests/test_masks.py -x")
#   make emulate CHIP=90       the kernels' tests on an emulated GPU, without one
#   make bench                 every benchmark suite, then runs/benchmarks/report.html  (SUITES="step masks")
#   make lint types wheel      style, types, dist/*.whl and dist/*.tar.gz
#   make gpu                   GPU tests and benchmarks, on a machine with one
#   make format clean distclean
# Another interpreter: make PYTHON=python3.12 demo

PYTHON ?= python3
VENV ?= .venv
DATA ?=
PYTEST_ARGS ?=
JOBS ?= auto
CHIP ?= 80
EMULATED ?= tests/kernels tests/benchmarks/emulator tests/benchmarks/test_emulate.py tests/test_goldens.py
SUITES ?= masks step kernels input scaling swap codegen
RESULTS := runs/benchmarks

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Bytecode is written at first import: compiling all of every package would double the time of the install.
unexport PYTHONDONTWRITEBYTECODE
.DEFAULT_GOAL := help
.PHONY: help demo test emulate bench lint format types wheel gpu clean distclean

help:
	@sed -n 's/^#   /  /p' Makefile

# Stamps, so that a second run installs nothing. .made comes after the venv is whole: one without pip is not taken for one.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastjepa needs Python 3.10 or newer, $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.%: pyproject.toml setup.py | $(VENV)/.made
	$(PIP) install --no-compile --editable '.[$*]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python -m fastjepa demo $(if $(DATA),--data '$(DATA)')

# One that hangs fails after 15 minutes. Sets have the same order in every run, so that what fails once fails again.
test: export PYTHONHASHSEED = 0
test: $(VENV)/.test
	$(BIN)/python -m pytest --timeout 900 -n $(JOBS) --maxprocesses 8 --benchmark-disable $(PYTEST_ARGS)

# Kernels are compiled for the chip, and what comes of it is run by the processor (docs/emulated.md).
emulate: export PYTHONHASHSEED = 0
emulate: export FASTJEPA_TEST_CHIP = $(CHIP)
emulate: export CUDA_VISIBLE_DEVICES =
emulate: $(VENV)/.test
	$(BIN)/python -m pytest --timeout 900 -n $(JOBS) --maxprocesses 8 $(EMULATED) $(PYTEST_ARGS)

# A suite that fails says so and does not keep the others from running; the report shows what there is.
bench: $(VENV)/.bench
	@mkdir -p $(RESULTS) && rm -f $(RESULTS)/*.json
	@failed=; for suite in $(SUITES); do \
	echo "==> $$suite"; $(BIN)/python -W ignore -m benchmarks $$suite --json $(RESULTS)/$$suite.json || failed="$$failed $$suite"; \
	done; \
	$(BIN)/python -m benchmarks report $(RESULTS)/*.json --html $(RESULTS)/report.html \
	&& { [ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }; }

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.test
	$(BIN)/pyright --pythonpath $(BIN)/python

wheel: $(VENV)/.test
	rm -rf dist
	$(BIN)/python -m build --no-isolation

gpu: $(VENV)/.test $(VENV)/.bench
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make gpu needs a CUDA GPU; fastjepa doctor says what is here")'
	$(BIN)/python -m pytest -m "gpu or compiled" $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m "not gpu" tests/ops/test_library.py tests/test_optim.py $(PYTEST_ARGS)
	$(BIN)/python -W ignore -m benchmarks step --model vit_base --save
	$(BIN)/python -W ignore -m benchmarks step --model vit_large --save
	$(BIN)/python -W ignore -m benchmarks step --model vit_huge --patch-size 14 --save
	$(BIN)/python -W ignore -m benchmarks step --model vit_huge --patch-size 14 --save \
	--row 'fastjepa truncated' --row 'fastjepa truncated, narrow stream' \
	--row 'fastjepa truncated, checkpointing' --row 'fastjepa truncated, predictor checkpointing' \
	--row 'fastjepa truncated, 4 parts'
	$(BIN)/python -W ignore -m benchmarks kernels --save

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
