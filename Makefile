# Two commands for a fresh machine: `make demo` and `make test`. Everything that is fetched or built goes to .venv or
# to the cache, so that a second run starts at once.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.set-up
CRD := crds/finetunejobs.yaml
CHART := helm/finetune-operator
CHART_CRD := $(CHART)/files/finetunejobs.yaml
CHART_README := $(CHART)/README.md
JOB_REFERENCE := docs/reference/job.md
CHECKED := $(wildcard crds operator trainer cli tests benchmarks scripts examples/safety)

.PHONY: help setup demo dev-cluster bench bench-operator models test faults e2e serve-test mutate check generate check-generated dist lock images scan clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv with the locked dependencies

$(STAMP): requirements.lock pyproject.toml scripts/setup.sh
	@scripts/setup.sh $(VENV)
	@touch $@

demo: setup ## fine-tune a small real model on this machine and compare its answers before and after
	@$(PYTHON) -m examples.safety.demo

dev-cluster: setup ## run a real control plane with the operator, to play with; PLAY=--play lets jobs succeed
	@$(PYTHON) -m tests.cluster.dev $(PLAY)

bench: setup ## measure the trainer beside TRL's, step by step in turn; BENCH="--shapes guard --rows 8 --rounds 1"
	@$(PYTHON) -m benchmarks.trainer $(BENCH)

bench-operator: setup ## measure the operator beside a naive one on a real control plane; BENCH="--rounds 1 --many 0"
	@$(PYTHON) -m benchmarks.operator $(BENCH)

models: setup ## train a tiny model of every type that transformers knows, and write docs/models.md; MODELS="--budget 20"
	@OMP_NUM_THREADS=1 $(PYTHON) -m tests.architectures --write docs/models.md $(MODELS)

test: setup ## check, and run every test but those on a real node or against a real vLLM
	@$(PYTHON) -m scripts.run_tests

faults: setup ## every fault on a real control plane: crashes, lost events, outages of minutes; FAULT="-k outages"
	@FAULTS=all $(PYTHON) -m pytest tests/faults tests/operator/simulation --timeout=3600 $(FAULT)

e2e: setup ## as root: build the images, start a real one-node Kubernetes, install the chart and train in real pods
	@$(PYTHON) tests/tools/build.py --for e2e
	@# Threads that spin while they wait make tests that share cores several times slower.
	@OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 $(PYTHON) -m pytest tests/node --timeout=3600 --durations=0 --durations-min=1

serve-test: setup ## train adapters, serve them with a real vLLM (5 GB the first time) and compare; SERVE="-k mixture"
	@$(PYTHON) tests/serving/environment.py
	@OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 $(PYTHON) -m pytest tests/serving --durations=0 --durations-min=5 $(SERVE)

mutate: setup ## break the policies and builders in small ways, and see that their own tests notice; MUTATE="policy"
	@$(PYTHON) -m tests.mutation $(MUTATE)

check: setup check-generated ## lint, types, layers, generated files
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/lint-imports --no-cache
	@$(VENV)/bin/mypy --cache-dir "$${FINETUNE_CACHE_DIR:-$$HOME/.cache/finetune-operator}/mypy" $(CHECKED)

generate: setup ## write the files that are generated from the contract, and the values in the chart's README
	@mkdir -p $(dir $(JOB_REFERENCE))
	@$(PYTHON) -m finetune_api.crd > $(CRD).new && mv $(CRD).new $(CRD)
	@$(PYTHON) -m finetune_api.reference > $(JOB_REFERENCE).new && mv $(JOB_REFERENCE).new $(JOB_REFERENCE)
	@cp $(CRD) $(CHART_CRD)
	@$(PYTHON) -m scripts.chart_readme > $(CHART_README).new && mv $(CHART_README).new $(CHART_README)

check-generated: setup
	@diff -u $(CRD) <($(PYTHON) -m finetune_api.crd) \
	  && diff -u $(JOB_REFERENCE) <($(PYTHON) -m finetune_api.reference) \
	  && diff -u $(CHART_CRD) $(CRD) \
	  && diff -u $(CHART_README) <($(PYTHON) -m scripts.chart_readme) \
	  || { echo "The generated files are out of date: run \`make generate\` and commit the result."; exit 1; }

dist: setup ## render dist/ from the chart, for kubectl and kustomize
	@$(PYTHON) -m scripts.dist

lock: ## resolve the dependencies anew into requirements.lock and the images' own
	@scripts/lock.sh

images: ## build both container images with docker, podman or buildah; IMAGES=operator, REGISTRY=registry.example/team
	@scripts/images.sh

scan: ## for releases: bills of materials of the images, and their known vulnerabilities; needs trivy
	@scripts/scan.sh

clean: ## remove .venv and what the tools leave behind; the cache stays
	@rm -rf $(VENV) finetune-output .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find crds operator trainer cli tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
