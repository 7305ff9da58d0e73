# The two commands are `make book` and `make test`; `make help` lists the others.
# They need Python 3.11 or newer, and make. Everything else goes into .venv, once.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
CACHE := _build/.jupyter_cache
PAGE := $(CURDIR)/_build/html/index.html

# Kernels and browsers must not talk more than the book does.
export PYDEVD_DISABLE_FILE_VALIDATION := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

NEW_ENOUGH := 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'

# What a target took, printed at its end.
define timed
@start=$$SECONDS; { $(2); } && echo "$(1): $$((SECONDS - start)) s"
endef

.PHONY: help venv export fresh render book page pdf chapters test check rehearsal lint house tidy lab bench evidence clean

help: ## say what each command does
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-9s %s\n", $$1, $$2}'

venv: ## set up .venv if it is missing or not as requirements.txt and pyproject.toml say
	@if ! cat requirements.txt pyproject.toml | cmp -s - $(VENV)/installed; then \
	    echo "venv: installing into $(VENV)"; \
	    if ! $(RUN) -c $(NEW_ENOUGH) 2>/dev/null; then \
	        "$(PYTHON)" -c $(NEW_ENOUGH); \
	        "$(PYTHON)" -m venv --clear $(VENV); \
	    fi; \
	    $(RUN) -m pip install --quiet -r requirements.txt; \
	    $(RUN) -m pip install --quiet --no-deps --no-build-isolation -e .; \
	    cat requirements.txt pyproject.toml > $(VENV)/installed; \
	fi
	@$(RUN) -c 'import matplotlib.font_manager' 2>/dev/null  # or its first use would print into a chapter
	@mkdir -p $(VENV)/etc/ipython && echo 'c.IPKernelApp.log_level = 40' > $(VENV)/etc/ipython/ipython_kernel_config.py  # or each kernel would warn of TCP

export: venv ## write diffussm/ from the chapters
	@$(RUN) -m tools.export

fresh: export
	@$(RUN) -m tools.cache

# Two at a time, each with one thread where it does not ask for more. Threads that wait must not spin then.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 OMP_WAIT_POLICY=passive
EXECUTE := $(ONE_THREAD) $(RUN) -m pytest --nbmake --nbmake-timeout 900 -n 2 --keep-outputs $(CACHE)

# After a failure every page is read again, or the next build would not repeat the warning.
render: fresh
	$(call timed,render,$(VENV)/bin/jupyter-book build . --warningiserror --keep-going --quiet \
	    || { rm -rf _build/.doctrees; exit 1; })

book: fresh ## export, execute all chapters (those that changed), render; prints the page to open
	$(call timed,chapters,$(EXECUTE) --skip-kept -q book)
	@$(MAKE) --no-print-directory render
	@echo "open file://$(PAGE)"

page: fresh ## execute and render one page: make page P=training
	@$(RUN) -m tools.page "$(P)"

pdf: venv ## print the rendered book as one PDF (needs Chromium): _build/diffussm.pdf
	$(call timed,pdf,$(RUN) -m tools.pdf)

chapters: fresh
	$(call timed,chapters,$(EXECUTE) book)

# The chapters run first and leave their outputs for the pages, so that nothing runs twice.
test: chapters ## everything that must hold: chapters, unit tests, export, lint, types, rendered pages
	@$(MAKE) --no-print-directory render
	$(call timed,tests,DIFFUSSM_REQUIRE_BOOK=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --max-worker-restart 0)

rehearsal: export ## the whole road at full scale, walked small: encode, train, crash, resume, sample, score
	@$(RUN) -m tools.rehearsal

# For every change. What takes longer is marked `slow` or `end_to_end` and belongs to `make test`.
check: lint ## in a minute: lint, types, package in step with the book, fast tests
	@$(RUN) -m tools.export --check
	$(call timed,check,OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --maxprocesses 4 -m "not slow and not end_to_end")

lint: venv ## ruff and mypy
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

house: venv ## how long cells, pages and modules are, and what may still be shorter
	@$(RUN) -m tools.house

tidy: venv ## format code, and store the chapters as JupyterLab will
	@$(RUN) -m ruff format .
	@$(RUN) -m tools.tidy

lab: venv ## JupyterLab; a double click on a chapter opens it as a notebook
	JUPYTER_CONFIG_PATH="$(CURDIR)/.jupyter" $(RUN) -m jupyter lab --notebook-dir="$(CURDIR)"

bench: venv ## ratios against peers and limits, measured side by side (a GPU: benchmarks/gpu.sh)
	@failed=""; for file in benchmarks/[!_]*.py; do \
	    name=$$(basename $$file .py); \
	    if [ $$name = gpu ] || [ $$name = matrix ] || [ $$name = chapters ] || ! grep -q '__main__' $$file; then continue; fi; \
	    echo "== benchmarks.$$name"; $(RUN) -m benchmarks.$$name || failed="$$failed $$name"; \
	done; \
	if [ -n "$$failed" ]; then echo "a limit was not reached, or nothing was reported, in:$$failed"; exit 1; fi

# Hours on two cores; what is there is not run again. For minutes: make evidence STUDIES=quick
STUDIES ?= cpu samples openmoji16
evidence: export ## the runs behind the page What matters, as many at once as there are cores (STUDIES=quick: minutes)
	@for name in $(STUDIES); do \
	    $(ONE_THREAD) $(RUN) -m diffussm study studies/$$name.yaml --out runs/$$name --record studies/results/$$name.jsonl; \
	done

clean: ## remove what was built (not .venv, not runs/)
	rm -rf _build build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
