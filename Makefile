# make demo    set up, then the whole path on the embedded world (a few minutes on two cores)
# make test    set up, then the tests; make test-slow the slow ones
# make bench   benchmarks on this machine's CPU, JSON under benchmarks/results/
# make gpu     on a GPU machine with torch, triton and nvcc: build in place, test, benchmark
# make lint    ruff

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
RUN     = $(BIN)/python
MINUTES ?= 9

.PHONY: setup demo test test-slow bench gpu lint clean

setup: $(VENV)/ready

# torch first and pinned: a later requirement must find it there, not fetch another build of it.
$(VENV)/ready: pyproject.toml setup.py constraints.txt $(wildcard csrc/*/*)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $$(grep '^torch==' constraints.txt) setuptools ninja
	$(BIN)/pip install --quiet --no-build-isolation -c constraints.txt -e '.[dev]'
	$(RUN) -c "import perl_kernels as pk; pk.show_config()"
	touch $@

demo: setup
	$(RUN) -m perl demo

test: setup
	$(RUN) -m pytest

test-slow: setup
	$(RUN) -m pytest -m slow

bench: setup
	$(RUN) -m pytest benchmarks

# Nothing can be downloaded on some GPU machines: this uses the python3 that has torch already.
gpu:
	$(PYTHON) -m benchmarks.gpu --minutes $(MINUTES) $(if $(DRY),--dry-run)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build dist *.egg-info perl_kernels/*.so perl_kernels/_cpu.json perl_kernels/_cuda.json
