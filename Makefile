# Every target does its own set-up: a machine needs only make and Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
DEMO := $(VENV)/.demo
READY := $(VENV)/.ready
# Tests wait for servers and processes as much as they compute. At most 4 processes, because each starts a Prefect server.
AT_ONCE := --numprocesses auto --maxprocesses 4 --dist worksteal
# uv doesn't compile packages when it installs them. Processes start in half the time if Python may cache its bytecode.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo poc-demo test test-slow test-gpu chaos examples lint format docs catalogue wheel pythons lock bench bench-setup bench-poc bench-peers bench-before oracle clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-13s %s\n", $$1, $$2 }' Makefile

demo: $(DEMO)  ## run hello-pt in simulation: three sites on scikit-learn's digits
	$(RUN)/python examples/hello-pt/job.py

poc-demo: $(READY)  ## run hello-pt in a proof of concept: PostgreSQL, S3, a worker process per site
	$(RUN)/python .ci/poc_demo.py

test: $(READY)  ## run the tests, with line and branch coverage
	$(RUN)/coverage erase
	$(RUN)/coverage run -m pytest -m "not slow and not gpu" $(AT_ONCE)
	$(RUN)/coverage combine --quiet
	$(RUN)/coverage report --skip-covered

test-slow: $(READY)  ## run the tests that take minutes
	$(RUN)/pytest -m "slow and not gpu" --timeout 3600 $(AT_ONCE)

test-gpu: $(READY)  ## run the tests that need a CUDA device
	$(RUN)/pytest -m gpu

chaos: $(READY)  ## break each component at every stage of a round; writes the table in docs/reliability.md (210 trials, about two hours)
	$(RUN)/python -m tests.chaos --write

examples: $(READY)  ## run every example with its README's command, then verify all of their jobs
	$(RUN)/python examples/hello-numpy/job.py
	$(RUN)/python examples/hello-pt/job.py
	$(RUN)/python examples/hello-lightning/job.py
	$(RUN)/python examples/cifar10/job.py --synthetic
	$(RUN)/python examples/cross-site/job.py
	$(RUN)/python examples/algorithms/job.py scaffold ditto
	for job in fedpool-runs/*/; do $(RUN)/fedpool job verify $$(basename $$job) --store fedpool-runs || exit 1; done

lint: $(READY)  ## run ruff, mdformat, and mypy on the package, its tests and tools
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mdformat --check $$(git ls-files '*.md')
	$(RUN)/mypy

format: $(READY)  ## apply the fixes of ruff and mdformat
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .
	$(RUN)/mdformat $$(git ls-files '*.md')

docs: $(READY)  ## run the commands and code in README.md, CONTRIBUTING.md and docs/
	$(RUN)/python .ci/run_docs.py

catalogue: $(READY)  ## generate docs/recipes/ from the recipes' docstrings and fields
	$(RUN)/python -m tools.catalogue docs

wheel: $(READY)  ## build the wheel and run a job from it in a clean environment
	.ci/check_wheel $(RUN)

pythons: $(READY)  ## the same with each other supported Python that is installed
	.ci/check_wheel $(RUN) 3.12 3.13

lock: $(READY)  ## pin pyproject.toml's dependencies in constraints.txt; UPGRADE=--upgrade takes the newest versions
	$(RUN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-annotate --no-header --quiet \
		--output-file constraints.txt $(UPGRADE)

bench: $(READY)  ## measure the README's figures: a bare loop and fedpool
	$(RUN)/python benchmarks/simulation.py

bench-setup: $(READY)  ## measure what `make demo` costs on a fresh machine, until its first round
	$(RUN)/python benchmarks/setup.py

bench-poc: $(READY)  ## measure a round's overhead in a proof of concept, with and without look-ahead (about 10 minutes)
	$(RUN)/python benchmarks/poc.py

bench-peers: .venvs/nvflare/.ready .venvs/flower/.ready  ## install NVFlare and Flower, for benchmarks/simulation.py --peers

bench-before:  ## install another commit of fedpool, COMMIT=48fad92, for benchmarks/simulation.py --engines fedpool,fedpool-before
	rm -rf .venvs/before .venvs/before-source
	mkdir -p .venvs/before-source
	git archive $(COMMIT) | tar -x -C .venvs/before-source
	$(PYTHON) -m venv .venvs/before
	.venvs/before/bin/pip install --quiet --constraint constraints.txt ".venvs/before-source[s3,poc]" scikit-learn

oracle: $(READY)  ## run every row of the oracle in SimEnv, with five seeds each (90 jobs of 50 rounds)
	$(RUN)/python benchmarks/oracle.py

clean:  ## remove everything that the targets above create
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
