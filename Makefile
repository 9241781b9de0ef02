# Every target does its own set-up: Python 3.11 and make are all a machine needs.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready
# Tests wait for servers and processes as much as they compute. Each process of them has a Prefect server, hence no more than 4.
AT_ONCE := --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: demo poc-demo test test-slow test-gpu chaos examples lint format docs catalogue wheel bench bench-poc bench-peers oracle clean

demo: $(READY)  ## hello-pt in simulation: three sites on scikit-learn's digits
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

chaos: $(READY)  ## kill or cut everything at every stage of a round; writes the matrix of docs/reliability.md (some two hours)
	$(RUN)/python -m tests.chaos --write

examples: $(READY)  ## every example, from its README's command; then all their jobs are verified
	$(RUN)/python examples/hello-numpy/job.py
	$(RUN)/python examples/hello-pt/job.py
	$(RUN)/python examples/hello-lightning/job.py
	$(RUN)/python examples/cifar10/job.py --synthetic
	$(RUN)/python examples/cross-site/job.py
	$(RUN)/python examples/algorithms/job.py scaffold ditto
	for job in fedpool-runs/*/; do $(RUN)/fedpool job verify $$(basename $$job) --store fedpool-runs || exit 1; done

lint: $(READY)  ## ruff and mypy
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

format: $(READY)  ## let ruff rewrite
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

docs: $(READY)  ## run the commands and the code of README and docs/
	$(RUN)/python .ci/run_docs.py

catalogue: $(READY)  ## write docs/recipes/ from the docstrings and the fields of the recipes
	$(RUN)/python -m fedpool.flows.catalogue docs

wheel: $(READY)  ## build the wheel and run a job from it in a clean environment
	.ci/check_wheel $(RUN)/python

bench: $(READY)  ## the README's figures: a bare loop and fedpool side by side
	$(RUN)/python benchmarks/simulation.py

bench-poc: $(READY)  ## overhead of a round in a proof of concept, with look-ahead and without (some 10 minutes)
	$(RUN)/python benchmarks/poc.py

bench-peers: .venvs/nvflare/.ready .venvs/flower/.ready  ## NVFlare and Flower, for benchmarks/simulation.py --peers

oracle: $(READY)  ## every row of the oracle, through SimEnv (some two hours)
	$(RUN)/python benchmarks/oracle.py

clean:  ## remove what the targets above have made
	rm -rf $(VENV) .venvs build dist fedpool-runs .coverage* src/*.egg-info

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

.venvs/%/.ready: benchmarks/peers/%-requirements.txt
	$(PYTHON) -m venv .venvs/$*
	.venvs/$*/bin/pip install --quiet --requirement $<
	touch $@
