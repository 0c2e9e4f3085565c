# Needs make and Python 3.11 or newer; each target installs into .venv what it lacks, once.
#   make train ARGS="--epochs 5"         make test ARGS="-k adam"         make test PYTHON=/path/to/python3.12
# Another PYTHON makes .venv anew; VENV=.venv-other keeps a second one beside it.

PYTHON ?=
VENV ?= .venv
MODULE ?= benchmarks.s1
ARGS ?=

# Held in the build environment too: newer pip reads the second name there, older pip the first.
export PIP_CONSTRAINT = constraints.txt
export PIP_BUILD_CONSTRAINT = constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help train test test-long test-slow test-newest test-compile lint docs gallery bench bench-all clean
.NOTPARALLEL:
.SECONDARY:

help:
	@echo "make train   train the digit classifier"
	@echo "make test    run all tests but the long and the slow ones"
	@echo "make test-long   run the long ones: experiments, pages, resumed runs, many devices and processes"
	@echo "make test-slow   run the slow ones"
	@echo "make test-newest   run all tests but the slow ones on the newest releases of everything"
	@echo "make test-compile   compile for GPUs and TPUs that are not here (1.3 GB of compilers)"
	@echo "make lint    ruff and pyright"
	@echo "make docs    build the site, docs/_build/html/index.html"
	@echo "make gallery   draw the pictures of docs/gallery from runs of the experiments (an hour)"
	@echo "make bench   compare speed with other libraries"
	@echo "make bench-all   all benchmarks, their tables into benchmarks/results (25 minutes)"
	@echo "make clean   remove the environments and caches"

train: $(VENV)/.installed-experiments
	$(VENV)/bin/python -m experiments.digits_mlp $(ARGS)

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -n 2 $(ARGS)

test-long: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -n 2 -m "long and not slow" $(ARGS)

test-slow: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -n 2 -m slow $(ARGS)

# Does what was released since break fnet? Always installs, and without constraints.
test-newest: export PIP_CONSTRAINT =
test-newest: export PIP_BUILD_CONSTRAINT =
test-newest: .venv-newest/.created
	.venv-newest/bin/python -m pip install --upgrade --upgrade-strategy eager --editable ".[test,loggers]"
	.venv-newest/bin/python -m pip freeze --exclude-editable
	.venv-newest/bin/python -m pytest -n 2 -m "not slow" $(ARGS)

# Nothing of the chips is needed, only NVIDIA's and Google's compilers.
test-compile: .venv-compile/.created
	.venv-compile/bin/python -m pip install --editable ".[test,compile-cuda,compile-tpu]"
	.venv-compile/bin/python -m pytest -m "long or not long" tests/test_compile.py $(ARGS)

lint: $(VENV)/.installed-lint $(VENV)/.installed-test
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m pyright --pythonpath $(VENV)/bin/python

# A name that does not resolve, a link or an anchor that is not there, a missing picture or derivation fails it.
docs: $(VENV)/.installed-docs
	$(VENV)/bin/python -m sphinx -b html -n -W --keep-going docs docs/_build/html $(ARGS)

# make gallery ARGS="--only optimizer_paths"; pages are taken by Debian's chromium.
gallery: $(VENV)/.installed-test
	$(VENV)/bin/python -m docs.generate.pictures $(ARGS)

bench: .venv-bench/.installed
	.venv-bench/bin/python -m $(MODULE) $(ARGS)

bench-all: .venv-bench/.installed
	.venv-bench/bin/python -m benchmarks $(ARGS)

clean:
	rm -rf .venv .venv-* .pytest_cache .ruff_cache .hypothesis

$(VENV)/.installed-%: $(VENV)/.created pyproject.toml constraints.txt
	$(VENV)/bin/python -m pip install --editable ".[$*]"
	@touch $@

.venv-bench/.installed: .venv-bench/.created pyproject.toml constraints.txt benchmarks/requirements.txt
	.venv-bench/bin/python -m pip install --editable . --requirement benchmarks/requirements.txt
	@touch $@

# Prints the version, and whether venv is missing as in Debian's python3; succeeds if the interpreter will do.
PROBE = import sys, importlib.util as util; venv = all(map(util.find_spec, ("venv", "ensurepip"))); \
	print("%d.%d.%d" % sys.version_info[:3] + ("" if venv else " without venv")); \
	sys.exit(not venv or sys.version_info < (3, 11))

CANDIDATES = python3 python3.13 python3.12 python3.11 python3.14
.venv-newest/.created: CANDIDATES = python3.14 python3.13 python3.12 python3.11 python3

# A shim may stand in for a version that is not installed, so each candidate is run, not only found.
ENVIRONMENTS = $(sort $(VENV) .venv-bench .venv-compile .venv-newest)
$(ENVIRONMENTS:=/.created):
	@seen=; \
	for python in $(if $(PYTHON),"$(PYTHON)",$(CANDIDATES)); do \
	    if version=$$("$$python" -c '$(PROBE)' 2>/dev/null); then \
	        echo "creating $(@D) with Python $$version ($$python)"; \
	        "$$python" -m venv --clear $(@D) && touch $@; exit; \
	    fi; \
	    seen="$$seen  $$python: $${version:-does not run}\n"; \
	done; \
	printf '%b' "error: fnet needs Python 3.11 or newer with its venv module; found\n$$seen" \
	    "Install one (Debian, Ubuntu: apt install python3-venv) or name one:" \
	    " make $(firstword $(MAKECMDGOALS)) PYTHON=/path/to/python3.11\n" >&2; \
	exit 1

# An environment of another Python than the PYTHON that is named is made anew, not used in its place.
ifneq ($(PYTHON),)
version = $(shell "$(1)" -c '$(PROBE)' 2>/dev/null)
.PHONY: $(foreach venv,$(ENVIRONMENTS),$(if $(filter-out $(call version,$(PYTHON)),$(call version,$(venv)/bin/python)),$(venv)/.created))
endif
