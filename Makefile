# The commands of the project. `make` alone lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash -o pipefail
PYTHON ?= python3.11
VENV := $(CURDIR)/.venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
WORKSPACE ?= .work/demo
PORT ?= 3000
# Nothing calls home, and every process takes one thread unless it asks for more.
export DO_NOT_TRACK=1
export DVC_NO_ANALYTICS=1
export RAY_USAGE_STATS_ENABLED=0
export BENTOML_DO_NOT_TRACK=True
export PREFECT_SERVER_ANALYTICS_ENABLED=false
export OMP_NUM_THREADS ?= 1
export PATH := $(VENV)/bin:$(PATH)

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: $(STAMP) ## a .venv with versions that work together
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed, as '$(PYTHON)'; name another with PYTHON=..."; exit 1; }
	@test -x $(PY) || { echo "creating .venv"; $(PYTHON) -m venv $(VENV); }
	@echo "installing (about 4 minutes and 7.4 GB the first time)"
	@$(PY) -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt \
	  -e '.[train,serve,monitor,flows,dev]' 2>$(VENV)/install.err \
	  | sed -un 's/^Collecting \([^ ]*\).*/  \1/p; s/^\(Installing collected\) .*/\1 packages/p' \
	  || { cat $(VENV)/install.err; exit 1; }
	@$(PY) -m pip check --disable-pip-version-check
	@touch $@

demo: setup ## the whole line on simulated laboratories (first run, set-up included: within 15 minutes on 2 cores)
	@$(PY) -m flows.lines demo

real: setup ## the whole line on real sets: make real DATA=folder (docs/data.md)
	@test -n "$(DATA)" || { echo "say where the data lies: make real DATA=folder (see docs/data.md)"; exit 2; }
	@$(PY) -m flows.lines real --data "$(DATA)"

real-full: setup ## the same with a longer training (40 to 55 minutes on 2 cores): make real-full DATA=folder
	@test -n "$(DATA)" || { echo "say where the data lies: make real-full DATA=folder (see docs/data.md)"; exit 2; }
	@$(PY) -m flows.lines real-full --data "$(DATA)"

real-cross: setup ## train on PBC alone and test on JHU, and the other way round: make real-cross DATA=folder
	@test -n "$(DATA)" || { echo "say where the data lies: make real-cross DATA=folder (see docs/data.md)"; exit 2; }
	@$(PY) -m flows.lines cross --data "$(DATA)"

real-folds: setup ## five trainings, so that each patient of JHU and each cell of PBC is tested once: make real-folds DATA=folder
	@test -n "$(DATA)" || { echo "say where the data lies: make real-folds DATA=folder (see docs/data.md)"; exit 2; }
	@$(PY) -m bench.folds --data "$(DATA)"

serve: setup ## start the last bento, without torch, and print curl lines that work: make serve WORKSPACE=.work/demo PORT=3000
	@$(PY) -m serving.run --workspace $(WORKSPACE) --port $(PORT) --venv .venv-serve

flows: setup ## Prefect's server, and the flows at their times: make flows WORKSPACE=.work/demo
	@cd $(WORKSPACE) && export PREFECT_HOME=$$PWD/.smearline/prefect PREFECT_API_URL=http://127.0.0.1:4200/api && \
	  { prefect server start --host 127.0.0.1 --port 4200 & trap "kill $$!" EXIT; \
	    until curl -sf $$PREFECT_API_URL/health >/dev/null; do sleep 1; done; python -m flows serve; }

drift-ui: setup ## Evidently's page, the history of every site: make drift-ui WORKSPACE=.work/demo
	@evidently ui --workspace $(WORKSPACE)/.smearline/evidently --host 127.0.0.1 --port 8000

loop: setup ## the loop once around: drift, verdict, overrides, ingest, retrain, gate, approval, switch, trace (needs make demo)
	@$(PY) -m bench.loop

scale: setup ## the data plane at 1,476,727 simulated images (25 GB of disk, an hour and more): make scale [ARGS='--images 20000 --keep']
	@$(PY) -m bench.scale $(ARGS)

proof-kill: setup ## make scale at 100,000 images killed up to 25 times: nothing twice, nothing lost (a quarter of an hour)
	@$(PY) -m bench.kill_drill

proof-postgres: setup ## the case store's tests on a PostgreSQL server that it starts (installs it where there is none)
	@$(PY) -m bench.postgres

test: setup lint ## ruff, mypy and the tests
	@$(PY) -m pytest

figures: setup ## record the results of .work/real-full and .work/cross-*, and make the README's tables from them
	@$(PY) -m bench.figures record

lint: setup ## ruff and mypy
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

clean: ## remove the workspaces (their data and models too), not the .venv
	rm -rf .work

.PHONY: help setup demo real real-full real-cross real-folds serve flows drift-ui loop scale figures proof-kill proof-postgres test lint clean
