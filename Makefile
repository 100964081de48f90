# `make quickstart` and `make test` need nothing but Python: they make .venv when it is missing or older than its pins.
# Another Python: `make PYTHON=/path/to/python3.12 test`. Other tests: `make test PYTEST_ARGS="tests/unit -x"`.

BIN := .venv/bin
INSTALLED := .venv/.installed
# One file stays in one worker, so that its module fixtures (a built wheel, a trained checkpoint) are made once. Files go
# in their order, the slow ones of whole runs first: workers then end together.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help quickstart test lint bench chaos experiment-coreset experiment-continual experiment-streaming clean

help:
	@echo "make quickstart   train a tiny agent on two processes, on a CPU, with nothing downloaded but packages"
	@echo "make test         the whole test suite"
	@echo "make lint         ruff and pyright"
	@echo "make bench        every benchmark, in its quick form"
	@echo "make experiment-coreset   which selection of data is worth what: a quarter of an hour"
	@echo "make experiment-continual   old tools, then new ones, by strategy (about 40 minutes on one thread)"
	@echo "make experiment-streaming   records as they arrive against all at once (20 minutes on one thread)"
	@echo "make chaos        every fault that a run must survive, tried for real: half an hour"
	@echo "make clean        remove caches and build leftovers"

quickstart: $(INSTALLED)
	$(BIN)/tune run --nproc_per_node 2 agent_sft_distributed --config tiny/agent_sft

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

bench: $(INSTALLED)
	@status=0; \
	for file in $(sort $(wildcard tests/benchmarks/bench_*.py)); do \
	    echo "== $$file"; \
	    $(BIN)/python "$$file" --quick || status=1; \
	done; \
	exit $$status

experiment-coreset: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python tests/experiments/coreset.py \
	    --json tests/benchmarks/results/coreset_cpu.json --report docs/experiments

experiment-continual: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python tests/experiments/continual.py

experiment-streaming: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python tests/experiments/streaming.py

# Some of it: make chaos CHAOS_ARGS="kills damage --seed 1"
chaos: $(INSTALLED)
	$(BIN)/python -m tests.chaos $(CHAOS_ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# A candidate is run, not only looked up: a version manager's shim exists for Pythons that are not active.
# constraints.txt holds torch to one version, so pip takes a CPU build of it wherever the index offers one.
$(INSTALLED): pyproject.toml constraints.txt
	@fits='import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'; \
	$(BIN)/python -c "$$fits" 2>/dev/null && exit 0; \
	for python in $(or $(PYTHON),python3.11 python3); do \
	    if "$$python" -c "$$fits" 2>/dev/null; then exec "$$python" -m venv --clear .venv; fi; \
	done; \
	echo "No usable Python: the versions in constraints.txt need 3.11, 3.12 or 3.13, and '$(or $(PYTHON),python3.11 python3)'" \
	     "gave none. Install one, or name it: make PYTHON=/path/to/python3.11" >&2; \
	exit 1
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@
