# nbdzram. `make help` lists what can be done here.
#
# Needs Debian's python3, python3-pip (or python3-venv), python3-dev and gcc; everything else goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find nbdzram -name '*.pyx' -o -name '*.pxd')
# What the manual pages are written from
MANUAL := tools/manual.py nbdzram/settings.py $(wildcard nbdzram/cli/*.py)

# What `make run` serves, and where: make run SIZE=4G PORT=10810
NAME ?= disk
SIZE ?= 1G
ADDRESS ?= 127.0.0.1
PORT ?= 10809
METRICS ?= 127.0.0.1:9809
# Where `make install` puts things; DESTDIR goes in front, for packagers
PREFIX ?= /usr/local
DESTDIR ?=
# How many tests `make test` runs at a time; they mostly wait for programs that they started
JOBS ?= 2
# What `make fuzz` tries on each target
RUNS ?= 2000000
# `make mutants` tries one in PART, or those named: make mutants MUTANTS="fold protocol"
PART ?= 1
MUTANTS ?=
# `make coverage` runs these tests, or those named
COVERED ?= tests/unit tests/model
# ... and begins none after so many
MINUTES ?= inf

.DEFAULT_GOAL := help
.PHONY: help install run demo build lint test test-slow mutants fuzz tsan coverage wheel dashboards bench bench-memory bench-scaling instructions sharing profile bundle clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(VENV)/built ## Start a server with one disk (NAME=disk SIZE=1G PORT=10809 METRICS=127.0.0.1:9809)
	@exec $(BIN)/nbdzram serve -e $(NAME)=$(SIZE) -i $(ADDRESS) -p $(PORT) --metrics $(METRICS)

demo: $(VENV)/built ## Watch a real disk image fold, in under a minute; needs no NBD client
	@$(BIN)/python -m tests.demo

build: $(VENV)/built ## Set up .venv and compile the data plane in place

lint: $(VENV)/built $(VENV)/dev ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: lint ## Check style and types, then run the tests (minutes)
	$(BIN)/pytest -m "not slow" -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-slow: lint ## Run every test, the long searches and every mutant too (hours)
	$(BIN)/pytest
	$(BIN)/python -m tests.mutants

wheel: $(VENV)/built ## Build a wheel into dist/
	@PYTHON='$(PYTHON)' tools/environment build_wheel $(VENV)
	@ls -l dist

install: $(VENV)/built ## Install program, manual and completions below PREFIX=/usr/local (as root)
	@PYTHON='$(PYTHON)' PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' tools/environment install_system $(VENV)

fuzz: $(VENV)/built $(VENV)/dev ## Search for bytes that break the protocol code or the opening of arenas, for hours (RUNS=2000000)
	FUZZ_RUNS=$(RUNS) $(BIN)/pytest tests/fuzz -m slow

tsan: $(VENV)/built $(VENV)/dev ## Look for races between threads of the engine, with a build of its own (ten minutes)
	$(BIN)/pytest -m slow tests/model/test_sanitizers.py -k thread_sanitizer

coverage: $(VENV)/built $(VENV)/dev ## Which lines of the data plane tests run, by a build of its own (COVERED="tests/unit tests/model")
	@$(BIN)/python -m tests.coverage $(COVERED)

mutants: $(VENV)/built $(VENV)/dev ## Make mistakes in the code, one at a time, and see which ones no test finds (PART=10: a tenth)
	@$(BIN)/python -m tests.mutants --part $(PART) --minutes $(MINUTES) $(MUTANTS)

dashboards: $(VENV)/dev ## Write the Grafana dashboard's JSON from deploy/grafana
	$(BIN)/python -m deploy.grafana.generate

bench: $(VENV)/built ## Measure speed and memory against nbdkit, in one run
	@$(BIN)/python -m tests.bench.acceptance

bench-memory: $(VENV)/built ## Measure density on real data against zram and nbdkit
	@$(BIN)/python -m tests.bench.memory

bench-scaling: $(VENV)/built ## Measure what more connections and processors bring, beside nbdkit and a bare copy (five minutes)
	@$(BIN)/python -m tests.bench.scaling

profile: $(VENV)/built ## Where the server's processor time goes under a load: make profile LOADS="read write" (with perf)
	@$(BIN)/python -m tests.bench.profile $(LOADS)

bundle: wheel ## Pack bench-scaling with all that it needs, for a larger machine without a network
	@tools/bundle $(VENV)

instructions: $(VENV)/built ## Count what requests, a fold and a scrape take, and fail where it is over 3 % more than it was
	@$(BIN)/python -m tests.bench.instructions

sharing: $(VENV)/built $(VENV)/dev ## Count what eight threads take from each other's memory, on any machine (minutes)
	@$(BIN)/python -m tests.bench.sharing

clean: ## Remove what was built; downloads in .cache stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find nbdzram -name '*.so' -delete
	find nbdzram -name '*.pyx' | sed 's/pyx$$/c/' | xargs -r rm -f

$(VENV)/ready: pyproject.toml setup.py tools/environment
	@PYTHON='$(PYTHON)' tools/environment create $(VENV)
	@touch $@

$(VENV)/built: $(VENV)/ready $(SOURCES) $(MANUAL)
	@tools/environment build $(VENV)
	@touch $@

$(VENV)/dev: $(VENV)/ready
	@tools/environment develop $(VENV)
	@touch $@
