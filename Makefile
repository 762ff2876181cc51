# `make search` and `make test` do all set-up on a fresh machine; `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
DATA ?= demo-data
WORKERS ?= 2
SECONDS ?= 90
ROUNDS ?= 1
FAULTS ?= 14300
RUNS ?= 100000
BIN := $(VENV)/bin
PACK ?= atelier.tar
MEGABYTES := 7500
missing = { echo "make: $(strip $(1))" >&2; exit 2; }
SLOWEST := --durations=10 --durations-min=1

.PHONY: help venv wheel pack search test test-browser test-cluster test-cluster-newer chaos simulation benchmark fuzz \
	check pythons format
help:
	@echo "make search   install, then run a whole search (DATA=folder for your own data)"
	@echo "make wheel    Atelier as a file for pip, in dist/"
	@echo "make pack     .venv as $(PACK), for machines without internet: unpack it anywhere, run atelier/bin/atelier"
	@echo "make test     install, then run the tests"
	@echo "make test-browser   those in a real Chromium"
	@echo "make test-cluster   those on a real SLURM, as root, with SLURM installed (DRILLS=...: some of them)"
	@echo "make test-cluster-newer   the same on the SLURM of a Debian 13, which debootstrap gets"
	@echo "make chaos    a search under faults for SECONDS, and ROUNDS backups of one that are finished elsewhere;"
	@echo "              then what holds is checked. As root with a full disk and a second host"
	@echo "make simulation   tests/simulation, then searches in which FAULTS go wrong, each of which a seed repeats"
	@echo "make benchmark   benchmarks/gpu.py on this machine, small: does it still run?"
	@echo "make fuzz     RUNS damaged files, in all, for everything that reads one"
	@echo "make check    lint and types"
	@echo "make format   rewrite the sources in the project's format"
	@echo "make pythons  is there a wheel of every package for each Python that pyproject.toml claims?"
	@echo "make venv     install into .venv only (VENV=.venv-3.13 PYTHON=python3.13: another one)"

venv: $(VENV)/installed

# What is missing is said before anything is downloaded. Without "compat" a folder named atelier, such as the
# clone, would hide atelier.py from what runs beside it.
$(VENV)/installed: pyproject.toml requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" 2> /dev/null || $(call missing, \
		$(PYTHON) is no Python 3.11 or newer; install one or name another: make venv PYTHON=python3.12)
	@$(PYTHON) -c "import ensurepip, venv" 2> /dev/null || $(call missing, \
		$(PYTHON) has no venv; on Debian and Ubuntu: apt install python3-venv)
	@$(PYTHON) -c "import ssl, sys; sys.exit(not any(ssl.get_default_verify_paths()[:2]))" || $(call missing, \
		there are no certificates to download with; on Debian and Ubuntu: apt install ca-certificates)
	@[ "$$(df -Pm . | awk 'END { print $$4 }')" -ge $(MEGABYTES) ] || $(call missing, \
		less than $(MEGABYTES) MB are free here and PyTorch with CUDA needs them; clone to another disk)
	@echo "Installing into $(VENV) (3.3 GB to download, 6.7 GB on the disk, most of it PyTorch: some minutes) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --progress-bar off --require-hashes --requirement requirements.txt
	$(BIN)/pip install --progress-bar off --no-deps --no-build-isolation --config-settings editable_mode=compat \
		--editable .
	@touch $@
	@echo "Installed: $(BIN)/atelier"

# setuptools would put what an earlier build has left into the wheel.
wheel: venv
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	rm -rf build

# Links take no room. A script's first line names its folder, so `atelier` gets another one.
pack: wheel
	rm -rf .pack && mkdir .pack && cp -al $(VENV) .pack/atelier
	rm -rf .pack/atelier/bin/atelier .pack/atelier/lib/python*/site-packages/*atelier[-_]*
	$(BIN)/python -m zipfile -e dist/atelier-*.whl .pack/atelier/lib/python*/site-packages
	printf '#!/bin/sh\nexec "$$(dirname "$$(readlink -f "$$0")")/python" -P -m atelier_command "$$@"\n' \
		> .pack/atelier/bin/atelier && chmod +x .pack/atelier/bin/atelier
	tar -C .pack -cf $(PACK) atelier && rm -rf .pack
	@echo "Packed: $(PACK)"

search: venv
	$(BIN)/atelier $(if $(filter demo-data,$(DATA)),demo,search studies/demo.toml --data "$(DATA)") --workers $(WORKERS)
	@echo "(atelier is $(BIN)/atelier, until you say: export PATH=\$$PWD/$(BIN):\$$PATH)"

test: venv
	@echo "Running the tests in three processes; a dot is a passed test. The first ones take a minute ..."
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist worksteal $(SLOWEST) \
		tests/unit tests/integration tests/chaos tests/fuzz

test-browser: venv
	$(BIN)/python -m pytest $(SLOWEST) tests/browser

test-cluster: venv
	$(BIN)/python -m pytest --numprocesses 6 --maxschedchunk 1 $(SLOWEST) $(if $(DRILLS),-k "$(DRILLS)") \
		tests/cluster

test-cluster-newer: venv
	tests/cluster/newer $(MAKE) test-cluster

chaos: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos.harness --seconds $(SECONDS)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos.backups --rounds $(ROUNDS)

simulation: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 $(SLOWEST) tests/simulation
	$(BIN)/python -m tests.simulation --faults $(FAULTS)

benchmark: venv
	$(BIN)/python -m benchmarks.gpu --small
	$(BIN)/python -m benchmarks.gpu --small --search
	$(BIN)/python -m benchmarks.gpu --small --mission

fuzz: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.fuzz --runs $(RUNS)

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

pythons: venv
	$(BIN)/python .ci/pythons

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
