# make demo    trains the quick Panoptic FPN with PGN on the CPU and draws what it learned
# make test    runs all tests
# make quick   runs the tests that are not slow, in less than 90 s
# make lint    checks the format and the code, changing nothing
# make docs    makes the pages of docs/ a site, in docs/_build
# make slurm-test runs comparisons on a Slurm cluster of this machine alone, made for it; installs no Slurm
# make oldest  runs the norms' tests with the oldest PyTorch that is supported, in an environment in build/versions
# make versions runs the quick tests with several versions of Python, PyTorch and NumPy, in environments in ENVIRONMENTS
# make results writes docs/results.md from the measurements in docs/results
# make gpu     tests and measures the kernels on a GPU, in MINUTES=9; DEVICE=cpu tries it, ANEW=1 forgets what was measured
# make gpu-train  trains Table 4's classifiers on Caltech-101 for MINUTES=9, DATA=its folders of classes; DEVICE=cpu tries it
# Each makes .venv first if it is not there; PYTHON names the interpreter to make it with.
PYTHON ?= python3
ENVIRONMENTS ?= ../gng_d2-versions
VENV := .venv
INSTALLED := $(VENV)/.installed
# a process for each core, of one thread each
# one more process than cores, because tests often wait for a process that they started
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --maxprocesses 8 --dist loadgroup
DEVICE ?= cuda
MINUTES ?= 9
DATA ?= $(or $(DETECTRON2_DATASETS),datasets)/caltech101

.PHONY: demo test quick lint docs slurm-test results gpu gpu-train oldest versions
demo: $(INSTALLED)
	$(VENV)/bin/python tools/demo.py

test: $(INSTALLED)
	$(PYTEST)

quick: $(INSTALLED)
	$(PYTEST) -m "not slow"

lint: $(INSTALLED)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

docs: $(INSTALLED)
	$(VENV)/bin/python -W ignore -m sphinx -q -W --keep-going -b html docs docs/_build

slurm-test: $(INSTALLED)
	$(VENV)/bin/python tests/slurm/cluster.py sinfo
	$(VENV)/bin/python -m pytest -q tests/slurm

oldest: $(INSTALLED)
	$(VENV)/bin/python tests/versions.py build/versions --only torch2.0 --python $(PYTHON) \
		--tests tests/ops tests/layers tests/models

versions: $(INSTALLED)
	$(VENV)/bin/python tests/versions.py $(ENVIRONMENTS)

results: $(INSTALLED)
	$(VENV)/bin/python tools/reproduce.py page

gpu: $(INSTALLED)
	$(VENV)/bin/python tools/gpu.py --device $(DEVICE) --minutes $(MINUTES) $(if $(ANEW),--anew)

RESULTS_cuda := docs/results
RESULTS_cpu := output
SIZES_cpu := --classes 2 --epochs 1 --image-size 64 --batch-size 8 --seeds 0
gpu-train: $(INSTALLED)
	$(VENV)/bin/python tools/reproduce.py table4 --data $(DATA) --device $(DEVICE) --minutes $(MINUTES) $(SIZES_$(DEVICE)) \
		--output output/classifier_$(DEVICE) --json $(RESULTS_$(DEVICE))/classifier_caltech101.json

$(INSTALLED): constraints.txt setup.py pyproject.toml tools/make_venv.py gng_d2/ops/cpu_kernels.c
	$(PYTHON) tools/make_venv.py $(VENV)
	@touch $@
