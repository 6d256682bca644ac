# make demo     train an assistant on this machine: SFT, reward model, PPO (minutes on 2 CPU cores)
# make test     every test
# make setup    the environment alone; every other target makes it when it is missing
# make unit     unit tests, oracles and doctests (under a minute)
# make check    formatting, lint, types, import direction
# make mutants  plants mistakes in the mathematics, one at a time, and sees that the tests notice (minutes)
# make chaos    kills processes of exact PPO runs at random moments, nodes, and a run kept in S3; all must go on to the same end (half an hour)
# make nodes    a cluster of Linux network namespaces: where processes sit, nodes that come and vanish (minutes; as root, with iproute2)
# make soak     half an hour of PPO steps: what grows, in which process
# make learn    the embedded task with four algorithms on five seeds; writes docs/results/learning.md (an hour)
# make bench    tokens per second and the share of each phase of a PPO iteration
# make lock     resolve requirements/ anew

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UV_COMPILE := $(BIN)/uv pip compile pyproject.toml --extra dev --extra tracking --python-version 3.11 --no-emit-package torch --no-annotate --no-header \
	--overrides requirements/overrides.txt --constraints requirements/constraints.txt --upgrade --quiet

.PHONY: setup demo test unit check mutants chaos nodes soak learn bench lock

setup: $(STAMP)

# Two steps: torch with its dependencies (its ordinary build needs its CUDA libraries even on a CPU), then the lock as it stands.
$(STAMP): requirements/cpu.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/cpu.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	DS_ACCELERATOR=cpu $(BIN)/python -c "import torch, vllm, deepspeed, ray, transformers"
	touch $@

demo: $(STAMP)
	$(BIN)/corral pipeline jobs/recipes/tiny/pipeline.toml --run.dir=runs/demo

# One thread per process: tests run many small tensors, and two processes that own the same cores slow each other down.
# Those on the real stack share one Ray and run one after the other.
test: unit
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/local_ray tests/e2e

unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical tests/unit tests/oracle

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

mutants: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.mutation

chaos: demo
	$(BIN)/python -m pytest tests/chaos
	$(BIN)/python -m bench.chaos --models runs/demo --rounds 10

nodes: $(STAMP)
	$(BIN)/python -m pytest tests/nodes

soak: demo
	$(BIN)/python -m bench.soak --models runs/demo --minutes 30

learn: $(STAMP)
	for seed in 1 2 3 4 5; do \
		$(BIN)/corral pipeline jobs/recipes/tiny/pipeline.toml --run.seed=$$seed --run.dir=runs/learn/ppo-$$seed || exit; \
		for name in grpo rloo reinforce_pp; do \
			$(BIN)/corral ppo jobs/recipes/tiny/ppo-grpo.toml --ppo.algorithm.name=$$name --run.seed=$$seed --run.dir=runs/learn/$$name-$$seed \
				--model.path=runs/learn/ppo-$$seed/sft/model --reward.path=runs/learn/ppo-$$seed/rm/model || exit; \
		done; \
	done
	mkdir -p docs/results
	$(BIN)/python -m bench.learning $$(for name in ppo grpo rloo reinforce_pp; do ls -d runs/learn/$$name-*; done) > docs/results/learning.md

bench: demo
	$(BIN)/python bench/ppo.py --model runs/demo/sft/model --steps 8 --json

# The CPU lock resolves only where uv finds torch's CPU build, which PyPI does not have: point UV_FIND_LINKS or UV_INDEX at one.
lock: $(STAMP)
	$(UV_COMPILE) --extra cpu --overrides requirements/overrides-cpu.txt -o requirements/cpu.txt
	$(UV_COMPILE) --extra cuda -o requirements/cuda.txt
