# `make help` lists the targets. Needs Linux, Python 3.11 or 3.12, git, make, a C++ compiler; see `prepare` below for what is missing and how to get it.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: demo demo-alfworld demo-seeds demo-lm demo-lm-alfworld demo-lm-train test lint format bench clean help

RUN ?= demo
SEED ?=
SEEDS ?= 0 1 2
ITERATIONS ?=
ARGS ?=
PYTHON ?=
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_GGUF := $(VENV)/.installed-gguf
SMOLLM2 := models/SmolLM2-135M-Instruct.Q4_1.gguf
PINS := pyproject.toml constraints.txt constraints-py312.txt
TRAIN_FLAGS := $(if $(SEED),--seed $(SEED)) $(if $(ITERATIONS),--iterations $(ITERATIONS))
FREE_GIB := 3

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | while IFS=$$'\t' read -r name text; do printf '  make %-16s %s\n' "$$name" "$$text"; done
	@printf '\n  RUN=name SEED=n ITERATIONS=n  of demo;  ARGS="..."  to pytest and the benchmark;  PYTHON=python3.12  for a new .venv\n'

# $(call run,PRESET): a run from training to report, in runs/$(RUN).
define run
	@$(VENV)/bin/ictjax train --preset $(1) --run-dir "runs/$(RUN)" $(TRAIN_FLAGS)
	@$(VENV)/bin/ictjax evaluate --run-dir "runs/$(RUN)"
	@$(VENV)/bin/ictjax report --run-dir "runs/$(RUN)"
endef

# $(call shipped,PRESET,FOLDER/): evaluates the adapters of seeds $(SEEDS) that ship.
define shipped
	@for seed in $(SEEDS); do [ -e "runs/$(RUN)$$seed/config.json" ] || $(VENV)/bin/ictjax adopt --preset $(1) --seed $$seed --adapter experiments/smollm/adapters/$(2)trained$$seed --run-dir "runs/$(RUN)$$seed"; done
	@$(VENV)/bin/ictjax evaluate --run-dir $(foreach seed,$(SEEDS),"runs/$(RUN)$(seed)") --out "runs/$(RUN)"
	@$(VENV)/bin/ictjax report --run-dir "runs/$(RUN)"
endef

demo: $(INSTALLED)  ## Train, evaluate and report the pocket pair on MiniHack (RUN=name for another run)
	$(call run,pocket-minihack)

demo-alfworld: RUN = demo-alfworld
demo-alfworld: $(INSTALLED)  ## The same on ALFWorld, on generated household games
	$(call run,pocket-alfworld)

demo-seeds: $(INSTALLED)  ## The demo for seeds 0 to 5, one table of all six, and what they show together
	@for seed in 0 1 2 3 4 5; do $(MAKE) --no-print-directory demo RUN=seed$$seed SEED=$$seed; done
	@$(VENV)/bin/ictjax compare $(addprefix runs/seed,0 1 2 3 4 5)
	@$(VENV)/bin/ictjax evaluate --run-dir $(addprefix runs/seed,0 1 2 3 4 5)

demo-lm: RUN = demo-lm
demo-lm: $(INSTALLED_GGUF) $(SMOLLM2)  ## Evaluate the SmolLM2 reflectors that ship, untrained and of three trained seeds
	$(call shipped,smollm2-minihack,)

demo-lm-alfworld: RUN = demo-lm-alfworld
demo-lm-alfworld: $(INSTALLED_GGUF) $(SMOLLM2)  ## The same on ALFWorld
	$(call shipped,smollm2-alfworld,alfworld/)

demo-lm-train: RUN = demo-lm-train
demo-lm-train: $(INSTALLED_GGUF) $(SMOLLM2)  ## Train, evaluate and report SmolLM2 on MiniHack (45 minutes; resumable)
	$(call run,smollm2-minihack)

$(SMOLLM2): | $(INSTALLED_GGUF)
	@$(VENV)/bin/ictjax models fetch smollm2

test: $(INSTALLED_DEV)  ## Run the tests
	@$(PY) -m pytest $(ARGS)

lint: $(INSTALLED_DEV)  ## Check format, style, import contracts and types
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(VENV)/bin/lint-imports --no-cache
	@$(PY) -m pyrefly check --python-interpreter-path $(PY)

format: $(INSTALLED_DEV)  ## Rewrite the files as lint wants them
	@$(PY) -m ruff check --fix-only .
	@$(PY) -m ruff format .

bench: $(INSTALLED)  ## Measure sampler, update and environments on this machine
	@$(VENV)/bin/ictjax bench $(ARGS)

clean:  ## Remove .venv and caches; runs/ stays
	@rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each problem: one sentence with the remedy, and exit code 2. A command that is there but does not run (a version manager's stub) does not count.
define prepare
	@stop() { printf 'ictjax: %s\n' "$$*" >&2; exit 2; }; \
	wanted='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'; \
	if [ -n "$(PYTHON)" ]; then \
	  "$(PYTHON)" -c '' 2>/dev/null || stop "PYTHON=$(PYTHON) does not run; name a Python 3.11 or 3.12, for example PYTHON=python3.12."; \
	  "$(PYTHON)" -c "$$wanted" || stop "PYTHON=$(PYTHON) is $$("$(PYTHON)" --version 2>&1); install Python 3.11 or 3.12 and name it, for example PYTHON=python3.12."; \
	fi; \
	if ! $(PY) -c "$$wanted" 2>/dev/null || ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  python=; \
	  for name in $(or $(PYTHON),python3.11 python3.12 python3 python); do \
	    if "$$name" -c "$$wanted" 2>/dev/null; then python="$$name"; break; fi; \
	  done; \
	  [ -n "$$python" ] || stop "no Python 3.11 or 3.12 was found on PATH; install one, or name it: make PYTHON=/path/to/python3.12."; \
	  "$$python" -c 'import ensurepip, venv' 2>/dev/null || stop "$$python cannot make virtual environments; install its venv package (on Debian or Ubuntu: apt install $$("$$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'))."; \
	fi; \
	command -v git >/dev/null || stop "git was not found; building minihack needs it: install git."; \
	command -v c++ >/dev/null || stop "c++ was not found; TextWorld's planner and interpreter are compiled at installation: install a C++ compiler (on Debian or Ubuntu: apt install g++)."; \
	case "$$(uname -s) $$(uname -m)" in \
	  "Linux x86_64" | "Linux aarch64") ;; \
	  *) command -v cmake >/dev/null || stop "cmake was not found, and nle has no wheel for $$(uname -s) on $$(uname -m): install cmake." ;; \
	esac; \
	free=$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1048576)}'); \
	[ "$$free" -ge $(FREE_GIB) ] || stop "only $$free GiB of disk are free in $$PWD and installation needs $(FREE_GIB): free some space, or clone to a larger disk."; \
	if [ -n "$${python:-}" ]; then echo "Making $(VENV) with $$("$$python" --version)."; "$$python" -m venv --clear $(VENV); fi
endef

# $(call install,EXTRAS): pinned versions by the interpreter's version; pip's own talk goes to a log that is shown when it fails. The planner of
# TextWorld builds itself with whatever `python` is on PATH.
define install
	$(prepare)
	@pins=$$($(PY) -c 'import sys; print("constraints-py312.txt" if sys.version_info >= (3, 12) else "constraints.txt")'); \
	echo "Installing the packages of $$pins into $(VENV) (1.5 GB, a few minutes; log: $(VENV)/install.log)."; \
	if ! PATH="$$PWD/$(VENV)/bin:$$PATH" $(PY) -m pip install --no-input --disable-pip-version-check -c "$$pins" -e '.$(1)' >$(VENV)/install.log 2>&1; then \
	  tail -n 15 $(VENV)/install.log >&2; \
	  echo "ictjax: pip could not install the packages (above: the end of $(VENV)/install.log); check the network and the disk, then run make again." >&2; \
	  exit 2; \
	fi; \
	touch $@
endef

$(INSTALLED): $(PINS)
	$(call install)

$(INSTALLED_DEV): $(PINS)
	$(call install,[dev])
	@touch $(INSTALLED)

$(INSTALLED_GGUF): $(PINS)
	$(call install,[gguf])
	@touch $(INSTALLED)
