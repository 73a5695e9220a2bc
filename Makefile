# Two commands: `make bench` measures every scorer beside its peers, `make test` passes the tests.
# Both set up .venv first, where that has not been done.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: bench test test-full lint setup demo clean

bench: setup
	$(RUN) -m bench.latency

test: setup
	$(RUN) -m pytest -m "not full"

test-full: setup
	$(RUN) -m pytest

lint: setup
	$(RUN) -m ruff check .

setup: $(READY)

$(READY): pyproject.toml setup.py CMakeLists.txt $(wildcard kernels/native/*)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --progress-bar on -e ".[bench,gpu,test]"
	touch $@

# The committed demo model: toy events, seed 0 (about 3 minutes).
demo: setup
	$(RUN) -m ebm train toy --out models/demo

clean:
	rm -rf build dist *.egg-info kernels/_native*.so
