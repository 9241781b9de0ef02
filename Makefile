# Every target does its own set-up: Python 3.11 or newer and make are all a machine needs.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
DEMO := $(VENV)/.demo
READY := $(VENV)/.ready
# Tests wait for servers and processes as much as they compute. Each process of them has a Prefect server, hence no more than 4.
AT_ONCE := --numprocesses auto --maxprocesses 4 --dist worksteal
# uv compiles nothing when it installs. A process starts in half the time when Python may keep what it has compiled.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo poc-demo test test-slow test-gpu chaos examples lint format docs catalogue wheel pythons lock bench bench-setup bench-poc bench-peers oracle clean

help:  ## what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-13s %s\n", $$1, $$2 }' Makefile

demo: $(DEMO)  ## hello-pt in simulation: three sites on scikit-learn's digits
	$(RUN)/python examples/hello-pt/job.py

poc-demo: $(READY)  ## hello-pt in a proof of concept: PostgreSQL, S3, a worker process per site
	$(RUN)/python .ci/poc_demo.py

test: $(READY)  ## the tests, with coverage of lines and branches
	$(RUN)/coverage erase
	$(RUN)/coverage run -m pytest -m "not slow and not gpu" $(AT_ONCE)
	$(RUN)/coverage combine --quiet
	$(RUN)/coverage report --skip-covered

test-slow: $(READY)  ## the tests that take minutes
	$(RUN)/pytest -m "slow and not gpu" --timeout 3600 $(AT_ONCE)

test-gpu: $(READY)  ## the tests that need a CUDA device
	$(RUN)/pytest -m gpu

chaos: $(READY)  ## kill or cut everything at every stage of a round; writes the matrix of docs/reliability.md (210 trials, some two hours)
	$(RUN)/python -m tests.chaos --write

examples: $(READY)  ## every example, from its README's command; then all their jobs are verified
	$(RUN)/python examples/hello-numpy/job.py
	$(RUN)/python examples/hello-pt/job.py
	$(RUN)/python examples/hello-lightning/job.py
	$(RUN)/python examples/cifar10/job.py --synthetic
	$(RUN)/python examples/cross-site/job.py
	$(RUN)/python examples/algorithms/job.py scaffold ditto
	for job in fedpool-runs/*/; do $(RUN)/fedpool job verify $$(basename $$job) --store fedpool-runs || exit 1; done

lint: $(READY)  ## ruff, mdformat, and mypy on the package, its tests and tools
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mdformat --check $$(git ls-files '*.md')
	$(RUN)/mypy

format: $(READY)  ## let ruff and mdformat rewrite
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .
	$(RUN)/mdformat $$(git ls-files '*.md')

docs: $(READY)  ## run the commands and the code of README and docs/
	$(RUN)/python .ci/run_docs.py

catalogue: $(READY)  ## write docs/recipes/ from the docstrings and the fields of the recipes
	$(RUN)/python -m tools.catalogue docs

wheel: $(READY)  ## build the wheel and run a job from it in a clean environment
	.ci/check_wheel $(RUN)

pythons: $(READY)  ## the same with each other Python that is supported and found here
	.ci/check_wheel $(RUN) 3.12 3.13

lock: $(READY)  ## pin what pyproject.toml asks for in constraints.txt; UPGRADE=--upgrade takes the newest set
	$(RUN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-annotate --no-header --quiet \
		--output-file constraints.txt $(UPGRADE)

bench: $(READY)  ## the README's figures: a bare loop and fedpool side by side
	$(RUN)/python benchmarks/simulation.py

bench-setup: $(READY)  ## what `make demo` costs on a fresh machine, before its first round
	$(RUN)/python benchmarks/setup.py

bench-poc: $(READY)  ## overhead of a round in a proof of concept, with look-ahead and without (some 10 minutes)
	$(RUN)/python benchmarks/poc.py

bench-peers: .venvs/nvflare/.ready .venvs/flower/.ready  ## NVFlare and Flower, for benchmarks/simulation.py --peers

oracle: $(READY)  ## every row of the oracle, five seeds each, through SimEnv (90 jobs of 50 rounds)
	$(RUN)/python benchmarks/oracle.py

clean:  ## remove what the targets above have made
	rm -rf $(VENV) .venvs build dist fedpool-runs .coverage* src/*.egg-info

$(DEMO): pyproject.toml constraints.txt .ci/install
	.ci/install $(PYTHON) $(VENV) demo
	touch $@

$(READY): $(DEMO)
	.ci/install $(PYTHON) $(VENV) dev
	touch $@

.venvs/%/.ready: benchmarks/peers/%-requirements.txt
	$(PYTHON) -m venv .venvs/$*
	.venvs/$*/bin/pip install --quiet --requirement $<
	touch $@
