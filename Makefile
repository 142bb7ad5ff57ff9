# make demo    set up, then the whole path on the embedded world (a few minutes on two cores)
# make test    set up, then the tests; make test-slow the slow ones
# make bench   benchmarks on this machine's CPU, JSON under benchmarks/results/
# make bench-check   today's ratios beside the committed ones of this kind of machine
# make report  figures, tables and benchmarks/results/report.html from the committed JSON
# make gpu     on a GPU machine with torch, triton and nvcc: build in place, test, benchmark
# make lint    ruff
# make asan    the compiled CPU kernels under AddressSanitizer, scratch memory full of NaN

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
RUN     = $(BIN)/python
MINUTES ?= 9

.PHONY: setup demo test test-slow bench bench-check report gpu lint asan clean

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

# A process a core; a file's tests stay together, as they share what is slow to make.
test: setup
	$(RUN) -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-slow: setup
	$(RUN) -m pytest -m slow

bench: setup
	$(RUN) -m perl bench

bench-check: setup
	$(RUN) -m benchmarks.check

report: setup
	$(RUN) -m benchmarks.report --write

# Nothing can be downloaded on some GPU machines: this uses the python3 that has torch already.
gpu:
	$(PYTHON) -m benchmarks.gpu --minutes $(MINUTES) $(if $(DRY),--dry-run)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A copy of the package under build/asan, so that the one in place stays as it is.
asan: setup
	PERL_KERNELS_BUILD=require PERL_KERNELS_SANITIZE=address \
	  $(RUN) setup.py -q build --build-base build/asan-temp --build-lib build/asan
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/asan \
	$(BIN)/pytest -q -s -p no:cacheprovider -k "not instruction_set and not memory" \
	  $(addprefix tests/test_,$(addsuffix .py,cpu_kernels lora_linear lora_mlp multi_lora_linear rms_norm head log_prob))

clean:
	rm -rf build dist *.egg-info perl_kernels/*.so perl_kernels/_cpu.json perl_kernels/_cuda.json
