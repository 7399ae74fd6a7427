# Two commands for a newcomer: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3.11
BIN := .venv/bin
# Where bytecode is not kept, each process compiles torch and transformers anew, for 10 of the 13 s of a start.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo test clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv==0.13.9
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraints constraints.txt --editable '.[train,dev]'
	@touch $@

demo: setup
	$(BIN)/python recipes/tiny/demo.py

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

clean: # what the demo made
	rm -rf data/shapes runs/plain runs/tensorar runs/eval
