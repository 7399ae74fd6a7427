# Commands for people who work on this: `make demo`, `make check` while you work, `make test` before you hand in.
# Each sets up .venv first.
PYTHON ?= python3.11
BIN := .venv/bin
# Where bytecode is not kept, each process compiles torch and transformers anew, for 10 of the 13 s of a start.
export PYTHONDONTWRITEBYTECODE :=
# Three test processes for two cores, since launched runs often wait; each has one thread. The tests of a
# file stay in one process, in the order of tests/conftest.py.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder
# Everything in process: no marker of pyproject.toml.
FAST := not launch and not server and not plan and not shipped and not parity and not slow

.PHONY: setup demo lint check test clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv==0.13.9
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraints constraints.txt --editable '.[train,dev]'
	@touch $@

demo: setup
	$(BIN)/python recipes/tiny/demo.py

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

check: lint # lint and the fast tier: under 3 minutes on 2 cores
	$(PYTEST) -m "$(FAST)"

test: setup # the whole suite: about 12 minutes on 2 cores
	$(PYTEST)

clean: # what the demo made
	rm -rf data/shapes runs/plain runs/tensorar runs/eval
