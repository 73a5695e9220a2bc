# Two commands: `make bench` measures every scorer beside its peers, `make test` passes the tests.
# Both set up .venv first, where that has not been done.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: bench gpu test test-full regress regress-baseline sanitize lint setup servers serve demo triton-server clean help

bench: setup  ## measure every backend beside its peers
	$(RUN) -m bench.latency

gpu:  ## everything about the kernel on an NVIDIA GPU (9 minutes; sets nothing up, needs numpy, torch and triton; OUT=DIR, GPUFLAGS=--quick)
	PYTHONPATH=. $(PYTHON) -m bench.gpu $(if $(OUT),--out $(OUT)) $(GPUFLAGS)

test: setup servers  ## a slice of every promise
	$(RUN) -m pytest -m "not full"

test-full: setup servers  ## the full matrices
	$(RUN) -m pytest

regress: setup  ## has a kernel become slower? (half a minute, on any machine)
	$(RUN) -m pytest bench/test_regression.py

regress-baseline: setup  ## write bench/results/regression.json anew
	FUSED_EBM_REGRESSION=rewrite $(RUN) -m pytest bench/test_regression.py

sanitize: setup  ## ASan, UBSan and TSan over the kernels and the reader of packed models
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" tests/native/sanitize.sh build/sanitize

lint: setup  ## ruff
	$(RUN) -m ruff check .

setup: $(READY)  ## .venv with all extras

$(READY): pyproject.toml setup.py CMakeLists.txt $(wildcard kernels/native/*)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --progress-bar on -e ".[bench,gpu,hep,serve,test]"
	touch $@

servers:  ## as root on Debian: PostgreSQL, Redis, promtool and Chromium for the tests, where they are missing
	tests/debian-packages.sh

serve: setup  ## the scoring service on the demo model, at http://127.0.0.1:8000
	$(RUN) -m serve models/demo

demo: setup  ## train the committed demo model again (toy events, seed 0: two minutes)
	$(RUN) -m ebm train toy --out models/demo
	$(RUN) -m ebm calibrate models/demo toy:2000000
	-$(RUN) -m kernels calibrate models/demo toy:2000000

triton-server: setup  ## .triton-server: Triton Inference Server 2.51, without docker, for its tests (half a minute)
	$(RUN) -m venv --clear .triton-server
	.triton-server/bin/python -m pip install --progress-bar on nvidia-pytriton==0.7.0 safetensors

clean:  ## remove what was built
	rm -rf build dist *.egg-info kernels/_native*.so

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12
