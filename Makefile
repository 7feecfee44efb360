# make demo    trains the quick Panoptic FPN with PGN on the CPU and draws what it learned
# make test    runs the tests
# make results writes docs/results.md from the measurements in docs/results
# Each makes .venv first if it is not there; PYTHON names the interpreter to make it with.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test results
demo: $(INSTALLED)
	$(VENV)/bin/python tools/demo.py

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -q

results: $(INSTALLED)
	PYTHONPATH=tools $(VENV)/bin/python -m study.page

$(INSTALLED): constraints.txt setup.py tools/make_venv.py gng_d2/ops/cpu_kernels.c
	$(PYTHON) tools/make_venv.py $(VENV)
	@touch $@
