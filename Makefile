# make demo    trains the quick Panoptic FPN with PGN on the CPU and draws what it learned
# make test    runs all tests
# make quick   runs the tests that are not slow, in less than 90 s
# make lint    checks the format and the code, changing nothing
# make docs    makes the pages of docs/ a site, in docs/_build
# make slurm-test runs comparisons on a Slurm cluster of this machine alone, made for it; installs no Slurm
# make results writes docs/results.md from the measurements in docs/results
# Each makes .venv first if it is not there; PYTHON names the interpreter to make it with.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test quick lint docs slurm-test results
demo: $(INSTALLED)
	$(VENV)/bin/python tools/demo.py

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -q

quick: $(INSTALLED)
	$(VENV)/bin/python -m pytest -q -m "not slow"

lint: $(INSTALLED)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

docs: $(INSTALLED)
	$(VENV)/bin/python -W ignore -m sphinx -q -W --keep-going -b html docs docs/_build

slurm-test: $(INSTALLED)
	$(VENV)/bin/python tests/slurm/cluster.py sinfo
	$(VENV)/bin/python -m pytest -q tests/slurm

results: $(INSTALLED)
	$(VENV)/bin/python tools/reproduce.py page

$(INSTALLED): constraints.txt setup.py pyproject.toml tools/make_venv.py gng_d2/ops/cpu_kernels.c
	$(PYTHON) tools/make_venv.py $(VENV)
	@touch $@
