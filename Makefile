# Two commands need nothing installed but Python 3.11 or later: `make check` and `make test`.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
JOBS ?= 2
PYTEST := $(RUN) pytest -n $(JOBS) --dist worksteal

# A run starts many processes, and some machines are set up to keep no bytecode.
BYTECODE := @$(RUN) compileall -q harness optimized reference tests

.PHONY: check test setup oracle upstream lint structure format bench sanitize clean

check: $(VENV)/ready  ## the oracle judges optimized/, then every bug of the zoo, and prints its verdict
	$(BYTECODE)
	$(PYTEST) tests/test_oracle.py tests/test_bugs.py $(ARGS)

test: $(VENV)/ready lint  ## everything: linters, types, the suite, the oracle
	$(BYTECODE)
	$(PYTEST) --junitxml=reports/junit.xml --oracle-json=reports/oracle.json --oracle-html=reports/oracle.html $(ARGS)

setup: $(VENV)/ready  ## the environment in .venv/ and nothing else; the other targets create it when they need it

oracle: $(VENV)/ready  ## the command-line tool: make oracle ARGS='replay FILE'
	@$(RUN) nsa_oracle $(ARGS)

upstream: $(VENV)/ready  ## surveys SGLang's or ENGINE=vllm's backend, the newest or VERSION=0.5.23, and compares with the record
	@$(RUN) nsa_oracle upstream $(if $(ENGINE),--engine $(ENGINE)) $(if $(VERSION),--version $(VERSION)) $(ARGS)

lint: $(VENV)/ready
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(VENV)/bin/lint-imports
	$(RUN) mypy

structure: $(VENV)/ready  ## prints the figures that the layout of harness/ is measured by; fails beyond a limit
	@$(RUN) tests.support.structure

format: $(VENV)/ready
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

bench:  ## times optimized/ beside the original and production kernels; uses your own environment, which needs a GPU
	@$(PYTHON) -c "import torch; torch.cuda.is_available() or exit('make bench: $(PYTHON) sees no CUDA device')"
	mkdir -p reports
	$(PYTHON) -m pytest tests/benchmarks --benchmark-only --benchmark-json=reports/benchmark.json
	$(PYTHON) -m tests.benchmarks.table reports/benchmark.json

sanitize:  ## a few saved cases under compute-sanitizer; uses your own environment, which needs a GPU and the CUDA toolkit
	$(PYTHON) -m nsa_oracle sanitize $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .upstream reports
